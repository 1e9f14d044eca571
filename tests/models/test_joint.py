"""Which adapted layers are made by one function, and that what changes about a layer is seen at the next call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from repbend_kernels.blocks import AdaptedLinears
from test_readers import KEYS, NAMES, P, apart, assert_equal_outcomes, inputs, layers_of, model_of, outcome
from torch import Tensor, nn

from repbend_fast.models import lora_dropout
from repbend_fast.models.layers.joint import Joint

Change = Callable[[Any], object]


@pytest.fixture
def served(monkeypatch) -> list[int]:
    """How many layers each call of a joint function served."""
    calls: list[int] = []
    run = AdaptedLinears.__call__

    def spied(self: AdaptedLinears, *args: object, **options: object) -> tuple[Tensor, ...]:
        calls.append(len(self.layers))
        return run(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(AdaptedLinears, "__call__", spied)
    return calls


def by_ops(model: Any) -> Any:
    """A copy whose layers go through their modules, whatever a joint function could do."""
    twin = copy.deepcopy(model)
    for layer in layers_of(twin).values():
        for joint in layer.joint:
            joint.of = lambda x: None
    return twin


@pytest.mark.parametrize("keys", [KEYS, None], ids=["dropout", "none"])
def test_one_function_serves_all_readers(served, keys) -> None:
    model = model_of()
    got = outcome(model, keys)
    assert served == [3, 1]
    assert_equal_outcomes(got, outcome(by_ops(model), keys))
    assert served == [3, 1]
    assert_equal_outcomes(got, outcome(apart(model), keys))


def _own_forward(base: nn.Linear) -> None:
    plain = base.forward
    base.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]


def _fresh(model: Any) -> None:
    torch.manual_seed(9)
    for layer in layers_of(model).values():
        layer.lora_B["default"].weight = nn.Parameter(torch.randn_like(layer.lora_B["default"].weight))


APART: dict[str, Change] = {
    "a hook": lambda layers: layers["k_proj"].base_layer.register_forward_hook(lambda m, args, y: 3 * y),
    "a pre-hook": lambda layers: layers["k_proj"].base_layer.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
    "a trained base": lambda layers: layers["k_proj"].base_layer.weight.requires_grad_(),
    "another forward": lambda layers: _own_forward(layers["k_proj"].base_layer),
    "another kind of layer": lambda layers: setattr(
        layers["k_proj"].base_layer,
        "__class__",
        type("Own", (nn.Linear,), {"forward": lambda self, x: x[..., :12] * 2}),
    ),
}


@pytest.mark.parametrize("change", APART)
@pytest.mark.parametrize("before", [True, False], ids=["from the first pass", "later"])
def test_a_layer_that_is_more_than_a_product_goes_its_own_way(served, change, before) -> None:
    model = model_of()
    if not before:
        outcome(model)
    APART[change](layers_of(model))
    served.clear()
    got = outcome(model)
    assert 3 not in served
    assert_equal_outcomes(got, outcome(by_ops(model)))


CHANGES: dict[str, Change] = {
    "rate": lambda model: [setattr(layer.lora_dropout["default"], "p", 0.1) for layer in layers_of(model).values()],
    "scaling": lambda model: [layer.scale_layer(3.0) for layer in layers_of(model).values()],
    "weights": _fresh,
    "base": lambda model: setattr(
        layers_of(model)["k_proj"], "base_layer", copy.deepcopy(layers_of(model)["v_proj"].base_layer)
    ),
    "bias": lambda model: setattr(
        layers_of(model)["q_proj"].base_layer, "bias", nn.Parameter(torch.ones(24).double(), requires_grad=False)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_counts_from_the_next_call_on(served, change) -> None:
    model = model_of()
    before = outcome(model)
    CHANGES[change](model)
    served.clear()
    got = outcome(model)
    assert served == [3, 1]
    assert not torch.equal(got["y"], before["y"])
    assert_equal_outcomes(got, outcome(by_ops(model)))


def test_another_active_adapter_counts_from_the_next_call_on(served) -> None:
    model = model_of()
    outcome(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=list(NAMES), lora_dropout=P, init_lora_weights=False))
    model.double().eval().set_adapter("other")
    served.clear()
    got = outcome(model)
    assert served == [3, 1]
    assert any("other" in name for name in got)
    assert_equal_outcomes(got, outcome(by_ops(model)))


def test_an_adapter_switched_off_and_a_merged_one(served) -> None:
    model = model_of()
    outcome(model)
    served.clear()
    with model.disable_adapter(), lora_dropout(model, KEYS):
        off = model(inputs())
    model.merge_adapter()
    with lora_dropout(model, KEYS):
        merged = model(inputs())
    assert not served
    assert not torch.allclose(off, merged)
    expected = copy.deepcopy(model)
    expected.unmerge_adapter()
    with expected.disable_adapter(), lora_dropout(expected, KEYS):
        assert torch.allclose(expected(inputs()), off)


def test_autocast_and_passes_that_keep_nothing_go_their_own_way(served) -> None:
    model = model_of().float()
    x = inputs().float()
    with lora_dropout(model, KEYS):
        with torch.no_grad():
            kept_nothing = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
        assert not served
        assert torch.equal(model(x), kept_nothing)
    assert served == [3, 1]


def test_somebody_else_s_loop_goes_its_own_way(served) -> None:
    """Nobody gives keys there, and masks are drawn."""
    model = model_of().train()
    model(inputs()).sum().backward()
    assert not served


def test_keys_of_another_number_of_rows() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="keys for 3 rows, but the pass has 20"), lora_dropout(model, torch.arange(3)):
        model(inputs())


def test_copies_hold_what_is_theirs() -> None:
    model = model_of()
    outcome(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert not torch.equal(outcome(twin)["y"], outcome(model)["y"])
    assert_equal_outcomes(outcome(twin), outcome(by_ops(twin)))
    layer = nn.Linear(2, 2)
    assert vars(pickle.loads(pickle.dumps(Joint([layer]))))["_linears"] is None
