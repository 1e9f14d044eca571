"""Products with NF4 weights as they run on a GPU: bitsandbytes' numbers, its own way for few rows, and back again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_compare import assert_matches
from test_lora_forward import peft_model
from torch import Tensor, nn

from repbend_fast.models.layers import nf4
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.nf4 import use_nf4_products

pytest.importorskip("bitsandbytes", reason="NF4 is bitsandbytes'")
GPU = torch.device("cuda")
ROWS = 300


def quantized(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two NF4 layers, the first with a bias; their scales are quantised too."""
    model: Any = peft_model(dtype, nf4=True).get_base_model()
    return nn.ModuleList([model.up_proj.base_layer, model.down_proj.base_layer])


def outcome(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    (grad,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape))
    return y.detach(), grad


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    made, whole = [], nf4.dequantize_nf4

    def counting(*arguments: Any, **options: Any) -> Tensor:
        made.append(arguments[3])
        return whole(*arguments, **options)

    monkeypatch.setattr(nf4, "dequantize_nf4", counting)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values_and_gradients_are_bitsandbytes(dtype, monkeypatch) -> None:
    layers = quantized(dtype)
    made = counted(monkeypatch)
    for layer in layers:
        x = torch.randn(2, ROWS // 2, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = outcome(layer, x)
        assert not made
        changes = Changes()
        use_nf4_products(layers, GPU, changes)
        got = outcome(layer, x)
        assert made == [(layer.out_features, layer.in_features)] * 2
        for found, value in zip(got, expected):
            assert found.dtype == value.dtype
            assert_matches(found, value, tolerance=1e-6 if dtype == torch.float32 else 4e-3)
        with torch.no_grad():
            assert torch.equal(layer(x), got[0]), "the reference pass takes the same way"
        changes.undo()
        made.clear()
        assert torch.equal(outcome(layer, x)[0], expected[0])
        assert not made


def test_few_rows_and_other_dtypes_go_bitsandbytes_way(monkeypatch) -> None:
    layers = quantized()
    use_nf4_products(layers, GPU)
    made = counted(monkeypatch)
    layers[0](torch.zeros(ROWS, 64, dtype=torch.float16))
    layers[0](torch.zeros(nf4.LEAST_ROWS - 1, 64))
    assert not made
    layers[0](torch.zeros(nf4.LEAST_ROWS, 64))
    assert len(made) == 1


def test_nothing_changes_on_a_cpu_or_twice() -> None:
    layers = quantized()
    use_nf4_products(layers, torch.device("cpu"))
    assert not any("forward" in vars(layer) for layer in layers)
    use_nf4_products(layers, GPU)
    first = [vars(layer)["forward"] for layer in layers]
    again = Changes()
    use_nf4_products(layers, GPU, again)
    again.undo()
    assert [vars(layer)["forward"] for layer in layers] == first


def test_nothing_of_x_is_kept_for_backward() -> None:
    layers = quantized()
    use_nf4_products(layers, GPU)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layers[0](torch.zeros(ROWS, 64, requires_grad=True))
    assert kept == []
