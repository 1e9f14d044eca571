"""Adapted layers that read one tensor share a mask and a down product; what they give is what each alone would."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from peft import LoraConfig, get_peft_model
from repbend_kernels import keyed_dropout, low_rank
from test_lora_training_mode import kept_elements
from tiny_models import WITHOUT_DROPOUT, adapted_model, flat, gradients, objective_config, ragged_batch, runner_on
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repbend_fast.models import lora_dropout, use_low_rank_forward
from repbend_fast.models.layers.lora import LowRankForward
from repbend_fast.models.layers.readers import groups_of
from repbend_fast.objectives import build_objective
from repbend_fast.step.levers import Levers

INNER, ROWS, P = 24, 20, 0.4
KEYS = torch.arange(ROWS).view(2, ROWS // 2) * 977
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


class _Block(nn.Module):
    """Three readers of x, or of which one reads something else; ``fails`` raises before the second."""

    def __init__(self) -> None:
        super().__init__()
        for name, width in zip(NAMES, (INNER, 12, 12, INNER)):
            setattr(self, name, nn.Linear(INNER, width, bias=name == "q_proj"))
        self.other = self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        if self.fails:
            raise RuntimeError("out of memory")
        k, v = self.k_proj(x.tanh() if self.other else x), self.v_proj(x)
        return x + self.o_proj(torch.sigmoid(q) * torch.cat([k, v], dim=-1))


def model_of(r: int = 4, **settings: Any) -> Any:
    """A frozen block with a random adapter in float64, our forwards on it."""
    torch.manual_seed(0)
    options = {"lora_dropout": P, "init_lora_weights": False, "target_modules": list(NAMES)} | settings
    model = get_peft_model(_Block().double().requires_grad_(False), LoraConfig(r=r, **options))
    model.double().eval()
    use_low_rank_forward(model)
    return model


def layers_of(model: Any) -> dict[str, Any]:
    return {
        path.rpartition(".")[2]: module for path, module in model.named_modules() if isinstance(module, LowRankForward)
    }


def inputs(grad: bool = True) -> Tensor:
    x = torch.randn(2, ROWS // 2, INNER, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_(grad)


def outcome(model: Any, keys: Tensor | None = KEYS, x: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    x = inputs() if x is None else x
    with lora_dropout(model, keys):
        y = model(x)
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def apart(model: Any) -> Any:
    """A copy whose layers make their own products, under the masks that they have."""
    twin = copy.deepcopy(model)
    for layer in layers_of(twin).values():
        layer.readers = None
    return twin


class _KeyedDropout(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return keyed_dropout(x, KEYS.reshape(x.shape[:-1]), self.place, P, implementation="eager")


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the op served."""
    run, calls = low_rank.low_rank_down, []
    monkeypatch.setattr(low_rank, "low_rank_down", lambda x, a, *rest: calls.append(len(a)) or run(x, a, *rest))
    return calls


def assert_equal_outcomes(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_matches(got[name], value, tolerance=1e-13, name=name)
        assert relative_l2(value.roll(1, 0), value) > 1e-3, name


def test_output_and_gradients_are_those_of_peft_with_one_mask(monkeypatch) -> None:
    model = model_of()
    theirs = copy.deepcopy(model)
    for name, layer in layers_of(theirs).items():
        layer.lora_dropout["default"] = _KeyedDropout(3 if name == "o_proj" else 0)
        layer.__class__ = type(layer).__mro__[2]
    x = inputs()
    y = theirs(x)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape))
    expected = {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    calls = products(monkeypatch)
    assert_equal_outcomes(outcome(model), expected)
    assert calls == [3, 1]


@pytest.mark.parametrize("keys", [KEYS, None], ids=["dropout", "none"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_what_they_share_changes_nothing(keys, recomputed) -> None:
    model = model_of()
    expected = outcome(apart(model), keys)
    if recomputed:
        whole = model.get_base_model()
        plain_forward = whole.forward
        whole.forward = lambda x: checkpoint(plain_forward, x, use_reentrant=False)
    assert_equal_outcomes(outcome(model, keys), expected)


def test_a_layer_that_reads_something_else_is_served_alone(monkeypatch) -> None:
    model = model_of()
    model.get_base_model().other = True
    expected = outcome(apart(model))
    assert_equal_outcomes(outcome(model), expected)
    assert layers_of(model)["q_proj"].readers.apart
    calls = products(monkeypatch)
    assert_equal_outcomes(outcome(model), expected)
    assert calls == [1, 1, 1, 1]


UNLIKE = {
    "ranks": lambda layers: None,
    "dropout": lambda layers: setattr(layers["k_proj"].lora_dropout["default"], "p", 0.2),
    "dtype": lambda layers: layers["v_proj"].lora_A.float(),
    "off": lambda layers: layers["k_proj"].enable_adapters(False),
}


@pytest.mark.parametrize("difference", UNLIKE)
def test_layers_that_differ_are_served_alone(difference, monkeypatch) -> None:
    model = model_of(r=64 if difference == "ranks" else 4)
    UNLIKE[difference](layers_of(model))
    if difference == "dtype":
        for p in layers_of(model)["v_proj"].lora_A.parameters():
            p.data = p.data.bfloat16().float()
    expected = outcome(apart(model))
    calls = products(monkeypatch)
    assert_equal_outcomes(outcome(model), expected)
    assert set(calls) == {1}
    assert not layers_of(model)["q_proj"].readers.apart


def test_two_adapters_at_once(monkeypatch) -> None:
    model = model_of()
    model.add_adapter("other", LoraConfig(r=2, target_modules=list(NAMES), lora_dropout=P, init_lora_weights=False))
    model.double().eval().base_model.set_adapter(["default", "other"])
    expected = outcome(apart(model))
    calls = products(monkeypatch)
    assert_equal_outcomes(outcome(model), expected)
    assert calls == [3, 3, 1, 1]


def test_nothing_is_held_after_a_pass_that_failed() -> None:
    model = model_of()
    x = inputs()
    tensor = weakref.ref(x)
    model.get_base_model().fails = True
    with pytest.raises(RuntimeError, match="out of memory"), lora_dropout(model, KEYS):
        model(x)
    del x
    gc.collect()
    assert tensor() is None
    model.get_base_model().fails = False
    assert_equal_outcomes(outcome(model), outcome(apart(model)))
    assert not layers_of(model)["q_proj"].readers.apart


def test_nothing_is_held_once_all_have_read() -> None:
    model = model_of().eval()
    x = inputs(grad=False)
    tensor = weakref.ref(x)
    with torch.inference_mode():
        model(x)
    del x
    gc.collect()
    assert tensor() is None


def test_x_changed_in_place_is_read_again() -> None:
    model = model_of()
    layers, x = layers_of(model), inputs(grad=False)
    with torch.no_grad():
        layers["q_proj"](x)
        x.mul_(2)
        found = layers["k_proj"](x)
        expected = layers_of(apart(model))["k_proj"](x)
    assert_matches(found, expected, tolerance=1e-14)


def test_a_drawn_mask_is_one_for_all_readers() -> None:
    """In somebody else's training loop, where no keys are given."""
    model = model_of(r=INNER).train()
    layers, x = layers_of(model), inputs(grad=False)
    masks = {name: kept_elements(layers[name], x.detach(), 7) for name in ("q_proj", "o_proj")}
    assert not torch.equal(masks["q_proj"], masks["o_proj"])
    torch.manual_seed(7)
    with torch.no_grad():
        once = {name: layers[name](x) for name in ("q_proj", "k_proj", "v_proj")}
        torch.manual_seed(7)
        again = {name: layers_of(apart(model))[name](x) for name in ("q_proj",)}
    assert_matches(once["q_proj"], again["q_proj"], tolerance=1e-14)
    for name, output in once.items():
        layer = layers[name]
        dropped = torch.where(masks["q_proj"], x / (1 - P), 0.0)
        expected = layer.base_layer(x) + layer.scaling["default"] * (
            dropped @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
        )
        assert_matches(output, expected, tolerance=1e-13, name=name)


def test_groups_go_by_parent_and_name() -> None:
    paths = ["0.attn.q_proj", "0.attn.k_proj", "0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj", "1.attn.q_proj"]
    assert groups_of(paths) == [paths[:2], paths[2:4], paths[4:5], paths[5:]]
    assert groups_of(["c_attn", "0.fc1", "0.fc2"]) == [["c_attn"], ["0.fc1"], ["0.fc2"]]


def test_a_whole_step_is_that_of_layers_apart() -> None:
    """All terms of RepBend, dropout on, streams in pieces; places are those of the groups."""

    def grads(alone: bool) -> Tensor:
        model = adapted_model(dtype=torch.float64, lora=WITHOUT_DROPOUT.model_copy(update={"dropout": 0.5}))
        runner = runner_on(model, Levers(piece_tokens={"safe": 60, "unsafe": 60, "retain": 60}))
        if alone:
            for layer in model.modules():
                if isinstance(layer, LowRankForward):
                    layer.readers = None
        for stream in build_objective(objective_config(), len(runner.parts.decoder.layers)).streams(ragged_batch(), 0):
            runner.backward(stream, dropout_seed=3)
        return flat(gradients(model))

    together, expected = grads(False), grads(True)
    assert expected.norm() > 0
    assert_matches(together, expected, tolerance=1e-11)
