"""Liger's layers: which modules they take over, that adapters still attach to them, and that the numbers stay those of
the model's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches
from tiny_models import BLOCKS, FAMILIES, flat, objective_config, run_step, tiny_model, wrap

from repbend_fast.config import Config
from repbend_fast.config.schema import ModelConfig
from repbend_fast.errors import UserError
from repbend_fast.models import find_decoder, load_model
from repbend_fast.models.layers import liger
from repbend_fast.models.layers.liger import check_liger, find_replaceable, replace_modules, use_liger, uses_liger

pytest.importorskip("liger_kernel", reason="Liger's layers need liger-kernel")
ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Per block: norms, and one final norm. Qwen3 and Gemma-3 norm queries and keys too; Gemma norms both sides of attention
# and MLP.
NORMS = {"llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 4, "gemma2": 4, "gemma3": 6, "phi3": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_mlps_and_attentions_of_every_block_are_replaced(family: str) -> None:
    model = tiny_model(family)
    before = {name: type(module) for name, module in model.named_modules()}
    found = replace_modules(model)
    assert len(found.norms) == NORMS[family] * BLOCKS + 1
    assert found.mlps == [f"layers.{i}.mlp" for i in range(BLOCKS)]
    assert found.attentions == [f"layers.{i}.self_attn" for i in range(BLOCKS)]
    body = find_decoder(model).body
    replaced = {name for name, module in body.named_modules() if uses_liger(module)}
    assert replaced == {*found.norms, *found.mlps, *found.attentions}
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_other_models_of_the_process_keep_their_own_layers() -> None:
    ids = torch.arange(3, 12)[None]
    other = tiny_model()
    expected = other(ids).logits
    replace_modules(tiny_model())
    assert not any(uses_liger(module) for module in other.modules())
    assert torch.equal(other(ids).logits, expected)
    assert torch.equal(tiny_model()(ids).logits, expected)


@pytest.mark.parametrize(("family", "targets"), [("llama", "q k v o gate up down"), ("phi3", "qkv o gate_up down")])
def test_lora_attaches_to_the_same_layers_afterwards(family: str, targets: str) -> None:
    plain, replaced = tiny_model(family), tiny_model(family)
    replace_modules(replaced)
    names = [sorted(n for n, p in wrap(model).named_parameters() if p.requires_grad) for model in (plain, replaced)]
    assert names[0] == names[1]
    for target in targets.split():
        assert sum(f".{target}_proj.lora_A" in name for name in names[1]) == BLOCKS


def test_the_replaced_mlp_calls_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.transformers import swiglu

    # The kernel itself needs a GPU; what matters here is which layers feed it.
    monkeypatch.setattr(swiglu, "_swiglu_dispatch", lambda a, b: torch.nn.functional.silu(a) * b)
    model = wrap(tiny_model())
    expected_model = wrap(tiny_model())
    replace_modules(model)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    mlp, expected_mlp = (find_decoder(m).layers[1].mlp for m in (model, expected_model))
    output = mlp(x)
    torch.testing.assert_close(output, expected_mlp(x))
    output.square().sum().backward()
    grads = {name: p.grad for name, p in mlp.named_parameters() if p.requires_grad}
    assert len(grads) == 6
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())
    with model.disable_adapter():
        assert not torch.equal(mlp(x), output)


def test_other_families_are_left_alone_with_a_note() -> None:
    model = tiny_model()
    find_decoder(model).body.config.model_type = "granite"
    assert find_replaceable(model) is None
    note = use_liger(model, "auto", CUDA)
    assert note is not None
    assert "model type granite" in note
    assert "\n" not in note
    with pytest.raises(
        UserError,
        match=r"model\.liger=true: Liger's layers are not used on model type granite .*; set model\.liger=auto or "
        r"false",
    ):
        use_liger(model, True, CUDA)
    assert not any(uses_liger(module) for module in model.modules())


def test_derived_classes_and_other_activations_are_left_alone() -> None:
    model = tiny_model()
    body = find_decoder(model).body
    mlp = type(body.layers[0].mlp)
    body.layers[0].mlp.__class__ = type("LlamaMLP", (mlp,), {"__module__": "somewhere.else"})
    body.layers[1].mlp.config = SimpleNamespace(hidden_act="gelu")
    found = find_replaceable(model)
    assert found is not None
    assert found.mlps == ["layers.2.mlp", "layers.3.mlp"]


@pytest.mark.parametrize(("setting", "device"), [("auto", CPU), (False, CUDA), (False, CPU)])
def test_off_and_auto_without_cuda_change_nothing(setting: liger.Setting, device: torch.device) -> None:
    model = tiny_model()
    assert use_liger(model, setting, device) is None
    assert not any(uses_liger(module) for module in model.modules())


def test_auto_on_cuda_replaces() -> None:
    model = tiny_model()
    assert use_liger(model, "auto", CUDA) is None
    assert any(uses_liger(module) for module in model.modules())


def test_asking_for_it_without_cuda_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"model\.liger=true: Liger's kernels need a CUDA device, and this run is on cpu; set model\.liger",
    ):
        load_model(ModelConfig(name=str(tmp_path), device="cpu", liger=True))
    with pytest.raises(ValueError, match=r"model\.liger=true needs a CUDA device, and model\.device=cpu"):
        Config(model=ModelConfig(name="m", device="cpu", liger=True), data={"sources": [{"path": "demo"}]})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    model = tiny_model()
    note = use_liger(model, "auto", CUDA)
    assert note is not None
    assert "pip install liger-kernel" in note
    with pytest.raises(
        UserError, match=r"model\.liger=true: liger-kernel cannot be imported .*pip install liger-kernel"
    ):
        check_liger(True, CUDA)


def test_numbers_through_the_interpreter() -> None:
    """Triton decides at import whether kernels are interpreted, so this takes a process of its own."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU the compiled kernels are tested")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "support" / "liger_interpreted.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.split() == ["llama:ok", "gemma3:ok", "phi3:ok"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_distance_and_gradient_on_the_gpu(family: str, dtype: torch.dtype) -> None:
    config = objective_config(alpha_mode="all", loss_mode="prompt_response")

    def on_gpu(replaced: bool, trained: bool) -> Any:
        model = tiny_model(family, dtype).to(CUDA)
        if replaced:
            replace_modules(model)
        return wrap(model, trained=trained).to(CUDA)

    results, _ = run_step(on_gpu(True, trained=False), config)
    for name in ("safe", "unsafe"):
        assert all(float(distance) == 0.0 for distance in results[name].layers[name].values())
    assert float(results["unsafe"].terms["cosine"]) > 0.01
    _, gradient = run_step(on_gpu(True, trained=True), config)
    _, expected = run_step(on_gpu(False, trained=True), config)
    # A unit vector's direction at a small difference is rounding in bfloat16; there the two need only be close.
    assert_matches(flat(gradient), flat(expected), tolerance=1e-3 if dtype == torch.float32 else 0.1)
