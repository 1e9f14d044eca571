"""A direction is gone at every block's input and output, as if it were taken out of every matrix that writes."""

from __future__ import annotations

import copy

import pytest
import torch
from model_picture import changed, picture
from tiny_models import VOCABULARY, tiny_model

from repbend_fast.models import find_decoder
from repbend_fast.models.ablation import projected_out, writing_parts
from repbend_fast.models.perturbation import visiting


def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def a_direction() -> torch.Tensor:
    """Of no special length."""
    return 7.0 * torch.randn(64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def orthogonal(model, unit: torch.Tensor, scale: float = 1.0):
    """A copy whose writing matrices have lost ``scale`` times their component along ``unit``: W ← W − s·u uᵀ W."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        embedding = other.get_input_embeddings().weight
        embedding -= scale * (embedding @ unit).unsqueeze(1) * unit
        for block in find_decoder(other).layers:
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight -= scale * torch.outer(unit, unit @ weight)
    return other


def test_logits_are_those_of_orthogonal_weights() -> None:
    """With the head untied and no biases in a Llama, both are the same function. Half of it, or the wrong sign, is
    not.
    """
    model, direction = tiny_model(dtype=torch.float64), a_direction()
    unit = direction / direction.norm()
    with projected_out(model, direction):
        got = model(input_ids=ids()).logits
    assert torch.allclose(got, orthogonal(model, unit)(input_ids=ids()).logits, rtol=1e-9, atol=1e-11)
    for wrong in (0.0, 0.5, -1.0, 2.0):
        assert not torch.allclose(got, orthogonal(model, unit, wrong)(input_ids=ids()).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
def test_the_direction_is_gone_at_every_state(family: str) -> None:
    """And with it nothing else: the first state is the embedding less its component."""
    model, direction = tiny_model(family, torch.float64), a_direction()
    unit = direction / direction.norm()
    states: dict[bool, list[torch.Tensor]] = {}

    for taken_out in (False, True):
        seen = states[taken_out] = []
        handles = [
            block.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            for block in find_decoder(model).layers
        ] + [
            find_decoder(model).body.norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        ]
        with projected_out(model, direction) if taken_out else visiting(model, lambda _, hidden: hidden):
            # Hooks of the test that stand before the projection would see the block's input as it was.
            for handle in handles[:-1]:
                handle.remove()
            handles[:-1] = [
                block.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
                for block in find_decoder(model).layers
            ]
            model(input_ids=ids(), use_cache=False)
        for handle in handles:
            handle.remove()
    assert len(states[True]) == find_decoder(model).num_blocks + 1
    for state in states[True]:
        assert (state @ unit).abs().max() < 1e-9 * state.norm(dim=-1).max()
    assert (states[False][0] @ unit).abs().max() > 1e-2
    first = states[False][0]
    assert torch.allclose(states[True][0], first - (first @ unit).unsqueeze(-1) * unit, rtol=1e-10, atol=1e-12)


def test_attention_and_mlp_lose_it_too() -> None:
    model, direction = tiny_model(dtype=torch.float64), a_direction()
    written: list[torch.Tensor] = []

    def keep(_, inputs, output):
        written.append(output[0] if isinstance(output, tuple) else output)

    with projected_out(model, direction):
        handles = [
            part.register_forward_hook(keep) for block in find_decoder(model).layers for part in writing_parts(block)
        ]
        model(input_ids=ids())
        for handle in handles:
            handle.remove()
    assert len(written) == 2 * find_decoder(model).num_blocks
    for output in written:
        assert (output @ direction).abs().max() < 1e-9 * output.norm(dim=-1).max() * direction.norm()


def test_everything_is_as_before_also_after_a_failure() -> None:
    model = tiny_model()
    before, logits = picture(model), model(input_ids=ids()).logits
    with pytest.raises(ZeroDivisionError), projected_out(model, a_direction().float()):
        _ = 1 / 0
    assert changed(before, picture(model)) == []
    assert torch.equal(model(input_ids=ids()).logits, logits)


@pytest.mark.parametrize("direction", [torch.zeros(64), torch.full((64,), torch.nan)])
def test_no_direction_is_refused(direction: torch.Tensor) -> None:
    model = tiny_model()
    before = picture(model)
    with pytest.raises(ValueError, match="finite and longer than 0"), projected_out(model, direction):
        pass
    assert changed(before, picture(model)) == []
