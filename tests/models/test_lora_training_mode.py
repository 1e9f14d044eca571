"""LoRA's dropout where no step gives keys: in training mode drawn from torch's generator, in evaluation mode none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from test_lora_forward import INNER, KEYS, P, inputs, ours, outcome, peft_model
from tiny_models import (
    BLOCKS,
    WITHOUT_DROPOUT,
    adapted_model,
    flat,
    gradients,
    objective_config,
    ragged_batch,
    runner_on,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repbend_fast.models import lora_dropout, use_low_rank_forward
from repbend_fast.objectives import build_objective
from repbend_fast.step.levers import Levers

HALF = WITHOUT_DROPOUT.model_copy(update={"dropout": 0.5})
IDS = torch.arange(24).view(2, 12) % 90 + 1


def training(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    return ours(peft_model(dtype, **settings)).train()


def drawn(model: Any, seed: int, x: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients of a forward and backward under a seed, with no keys anywhere."""
    x = inputs(torch.float64) if x is None else x
    model.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = model(leaf)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape))
    return {"y": y.detach(), "x": leaf.grad} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


def kept_elements(layer: Any, x: Tensor, seed: int | None = None) -> Tensor:
    """The mask that ``layer`` draws, under ``seed``, seen from outside: A and B pass each element on to a place of its
    own.
    """
    open_layer = copy.deepcopy(layer)
    open_layer.lora_A["default"].weight.data = torch.eye(x.shape[-1], dtype=x.dtype)
    open_layer.lora_B["default"].weight.data = torch.eye(layer.out_features, x.shape[-1], dtype=x.dtype)
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        return (open_layer(x) - layer.base_layer(x))[..., : x.shape[-1]] != 0


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_another_loop_gets_dropout_from_train_and_none_from_eval(grad) -> None:
    model = adapted_model(lora=HALF)
    use_low_rank_forward(model)
    with torch.set_grad_enabled(grad):
        plain = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, plain)
        model.train()
        torch.manual_seed(0)
        first, second = (model(input_ids=IDS).logits for _ in range(2))
        torch.manual_seed(0)
        again = model(input_ids=IDS).logits
        assert not torch.equal(first, second)
        assert not torch.equal(first, plain)
        assert torch.equal(again, first)
        with model.disable_adapter():
            off = model(input_ids=IDS).logits
            assert torch.equal(model(input_ids=IDS).logits, off)
        model.eval()
        assert torch.equal(model(input_ids=IDS).logits, plain)


@pytest.mark.parametrize("change", ["p = 0", "modules in evaluation mode"])
def test_dropout_modules_that_are_switched_off_stay_off(change) -> None:
    model = training()
    expected = copy.deepcopy(model).eval()(inputs(torch.float64))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            if change == "p = 0":
                module.p = 0.0
            else:
                module.eval()
    assert torch.equal(model(inputs(torch.float64)), expected)


def test_the_share_and_the_size_of_what_is_kept() -> None:
    model = training(r=INNER)
    x = torch.randn(4, 500, INNER, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    kept = kept_elements(model.get_base_model().up_proj, x, 11)
    assert abs(kept.double().mean() - (1 - P)) < 0.005  # four standard deviations
    assert kept.flatten(0, 1).unique(dim=0).shape[0] == 2000, "rows share masks"


def test_output_and_gradients_are_those_of_the_masked_expression() -> None:
    model = training(r=INNER)
    layer = model.get_base_model().up_proj
    x = inputs(torch.float64).detach()
    kept = kept_elements(layer, x, 7)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(7)
    y = layer(leaf)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    factors = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    got = dict(zip(("x", "A", "B"), torch.autograd.grad((y * factors).sum(), (leaf, a, b))))
    # What PEFT computes: B(A(dropout(x))) · s beside the base layer.
    plain = x.clone().requires_grad_()
    dropped = torch.where(kept, plain / (1 - P), 0.0)
    expected_y = layer.base_layer(plain) + dropped @ a.T @ b.T * layer.scaling["default"]
    expected = dict(zip(("x", "A", "B"), torch.autograd.grad((expected_y * factors).sum(), (plain, a, b))))
    assert_matches(y, expected_y, tolerance=1e-14)
    for name, value in expected.items():
        assert_matches(got[name], value, tolerance=1e-13, name=name)
        for wrong in (torch.zeros_like(value), -value, value.roll(1, 0)):
            assert relative_l2(wrong, value) > 0.1, name


def test_the_mean_of_many_draws_is_the_output_without_dropout() -> None:
    """Of the adapter's part alone, the base layer's being the same; without the factor 1/(1 − p) it would be 30 %
    short.
    """
    layer, draws = training().get_base_model().up_proj, 1500
    x = inputs(torch.float64).detach()
    torch.manual_seed(0)
    with torch.no_grad():
        base = layer.base_layer(x)
        outputs = layer(x.expand(draws, *x.shape).flatten(0, 1)).view(draws, *base.shape) - base
        layer.eval()
        expected = layer(x) - base
    assert relative_l2(outputs[0], expected) > 0.4
    assert relative_l2(outputs.mean(dim=0), expected) < 0.03


def test_each_layer_and_each_call_draws_for_itself() -> None:
    model = training(r=INNER)
    base = model.get_base_model()
    x = torch.ones(1, 30, INNER, dtype=torch.float64)
    first = kept_elements(base.up_proj, x, 1)
    assert torch.equal(kept_elements(base.up_proj, x, 1), first)
    assert not torch.equal(kept_elements(base.up_proj, x, 2), first)
    twin = copy.deepcopy(base.up_proj)
    twin.place = base.down_proj.place
    assert not torch.equal(kept_elements(twin, x, 1), first), "equal draws give equal masks in two layers"
    second = kept_elements(base.up_proj, x)
    agreement = (second == kept_elements(base.up_proj, x)).double().mean()
    assert abs(agreement - (P**2 + (1 - P) ** 2)) < 0.05, "two calls in a row share part of their masks"


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_recomputed_block_draws_the_same_masks(reentrant) -> None:
    model = training()
    expected = drawn(model, 5)
    assert not torch.equal(drawn(model, 6)["y"], expected["y"])
    whole = model.get_base_model()
    plain_forward = whole.forward
    whole.forward = lambda x: checkpoint(plain_forward, x, use_reentrant=reentrant)
    for name, value in drawn(model, 5).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_of_transformers(reentrant) -> None:
    def gradient(recomputed: bool) -> Tensor:
        model = adapted_model(lora=HALF)
        if recomputed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(3)
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        return flat(gradients(model))

    plain, recomputed = gradient(False), gradient(True)
    assert plain.norm() > 0
    assert torch.equal(recomputed, plain)


def test_keys_decide_in_either_mode() -> None:
    model = ours(peft_model(torch.float64))
    keyed, plain = outcome(model, inputs(torch.float64), KEYS), outcome(model, inputs(torch.float64))
    model.train()
    for keys, expected in ((KEYS, keyed), (None, plain)):
        found = outcome(model, inputs(torch.float64), keys)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    with lora_dropout(model, KEYS):
        with lora_dropout(model, None):
            assert torch.equal(model(inputs(torch.float64)), plain["y"])
        assert torch.equal(model(inputs(torch.float64)), keyed["y"])
    assert not torch.equal(model(inputs(torch.float64)), plain["y"]), "the mode decides again"


def test_the_step_does_not_depend_on_the_mode() -> None:
    results = []
    for mode in (False, True):
        model = adapted_model(lora=HALF).train(mode)
        runner = runner_on(model, Levers(checkpoint_blocks=2))
        streams = build_objective(objective_config(), BLOCKS).streams(ragged_batch(), 0)
        torch.manual_seed(0 if mode else 1)
        measured = [runner.measure(stream).loss for stream in streams]
        trained = [runner.backward(stream, dropout_seed=4).loss for stream in streams]
        results.append((torch.stack(measured + trained), flat(gradients(model))))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_masks_on_a_gpu_come_from_its_own_generator(reentrant) -> None:
    model = training(torch.float32).cuda()
    x = inputs(torch.float32).detach().cuda()
    expected = drawn(model, 5, x)
    assert not torch.equal(drawn(model, 6, x)["y"], expected["y"])
    whole = model.get_base_model()
    plain_forward = whole.forward
    whole.forward = lambda x: checkpoint(plain_forward, x, use_reentrant=reentrant)
    for name, value in drawn(model, 5, x).items():
        assert torch.equal(value, expected[name]), name
