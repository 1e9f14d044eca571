"""Perturbed passes: the gradient is that of a plain forward with hooks, rows stay in their ball, and the loss falls."""

from __future__ import annotations

import pytest
import torch
from tiny_models import BLOCKS, VOCABULARY, adapted_model, tiny_model

from repbend_fast.models import find_decoder, run_decoder
from repbend_fast.models.perturbation import Perturbation, find_perturbation, visiting

STATES = (0, 2, 3)
ROWS = torch.tensor([0, 1, 2, 9, 10])
"""Three rows of the first sequence and two of the second, of nine tokens each."""


def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def of_states(model, deltas, tokens) -> torch.Tensor:
    """Logits of a plain forward with δ added by hooks at the embedding and behind blocks."""
    decoder = find_decoder(model)

    def adding(delta):
        def hook(_, inputs, output):
            hidden = output[0] if isinstance(output, tuple) else output
            added = torch.zeros_like(hidden).view(-1, hidden.shape[-1])
            added[ROWS] = delta
            return hidden + added.view_as(hidden)

        return hook

    handles = [
        (model.get_input_embeddings() if state == 0 else decoder.layers[state - 1]).register_forward_hook(adding(delta))
        for state, delta in deltas.items()
    ]
    try:
        return model(input_ids=tokens).logits
    finally:
        for handle in handles:
            handle.remove()


def some_perturbation(dtype: torch.dtype, **settings) -> Perturbation:
    perturbation = Perturbation(dict.fromkeys(STATES, 3.0), ROWS, 64, dtype=dtype, **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for delta in perturbation.deltas.values():
            delta.copy_(0.3 * torch.randn(delta.shape, generator=generator, dtype=dtype))
    return perturbation


@pytest.mark.parametrize(
    ("family", "recompute"), [("llama", False), ("llama", True), ("gemma2", False), ("qwen3", True)]
)
def test_gradient_is_that_of_a_forward_with_hooks(family: str, recompute: bool) -> None:
    model, tokens = tiny_model(family, torch.float64), ids()
    perturbation = some_perturbation(torch.float64)
    copies = {state: delta.detach().clone().requires_grad_() for state, delta in perturbation.deltas.items()}
    weights = torch.randn(2, 9, VOCABULARY, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want = of_states(model, copies, tokens)
    wanted = torch.autograd.grad((want * weights).sum(), list(copies.values()))
    with visiting(model, perturbation.visit(), recompute=recompute):
        got = model(input_ids=tokens, use_cache=False).logits
    found = torch.autograd.grad((got * weights).sum(), list(perturbation.deltas.values()))
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(found, wanted):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-11)
        assert theirs.abs().mean() > 1e-3
        for wrong in (torch.zeros_like(mine), -mine, mine.roll(1, 0)):
            assert not torch.allclose(wrong, theirs, rtol=1e-9, atol=1e-11)
    assert all(p.grad is None for p in model.parameters())


def test_the_same_visit_goes_through_a_tapped_pass() -> None:
    """As an objective runs it: rows are added before the state goes on to the pass's own visit."""
    model, tokens = tiny_model(dtype=torch.float64), ids()
    perturbation, seen = some_perturbation(torch.float64), {}

    def keep(state, hidden):
        seen[state] = hidden
        return hidden

    run_decoder(find_decoder(model), tokens, stop=BLOCKS, visit=perturbation.visit(keep))
    want = of_states(model, {state: delta.detach() for state, delta in perturbation.deltas.items()}, tokens)
    assert torch.allclose(model.lm_head(seen[BLOCKS]), want, rtol=1e-10, atol=1e-12)
    plain: dict[int, torch.Tensor] = {}
    run_decoder(find_decoder(model), tokens, stop=1, visit=lambda state, hidden: plain.setdefault(state, hidden))
    added = (seen[0] - plain[0]).view(-1, 64)
    assert torch.allclose(added[ROWS], perturbation.deltas[0], atol=1e-12)
    added[ROWS] = 0
    assert not added.any()


def test_sequences_share_rows() -> None:
    """Two answers to one prompt get the same rows, and their gradients add up."""
    model, tokens = tiny_model(dtype=torch.float64), ids()
    shared = some_perturbation(torch.float64, of=torch.tensor([0, 1, 2, 0, 1]))
    apart = some_perturbation(torch.float64)
    with torch.no_grad():
        for state, delta in shared.deltas.items():
            apart.deltas[state].copy_(delta[[0, 1, 2, 0, 1]])
    found = []
    for perturbation in (shared, apart):
        with visiting(model, perturbation.visit()):
            loss = model(input_ids=tokens, use_cache=False).logits.square().mean()
        found.append(torch.autograd.grad(loss, list(perturbation.deltas.values())))
    for one, five in zip(*found):
        assert torch.allclose(one, torch.stack((five[0] + five[3], five[1] + five[4], five[2])), rtol=1e-9, atol=1e-13)
        assert not torch.allclose(one[:2], five[:2], rtol=1e-3)


@pytest.mark.parametrize(
    ("ball", "radii", "step_size"), [("l2", {0: 0.2, 2: 0.5, 3: 1.5}, 0.2), ("linf", {0: 0.2, 2: 0.4, 3: 1.0}, 0.1)]
)
def test_rows_stay_in_their_ball_and_the_loss_falls(ball, radii, step_size) -> None:
    model = adapted_model(dtype=torch.float32)
    tokens = ids()
    perturbation = Perturbation(radii, ROWS, 64, ball=ball)

    def loss(visit):
        with visiting(model, visit):
            return torch.nn.functional.cross_entropy(
                model(input_ids=tokens, use_cache=False).logits[:, -1], tokens[:, 0]
            )

    losses = find_perturbation(loss, perturbation, steps=12, step_size=step_size)
    with torch.no_grad():
        after = float(loss(perturbation.visit()))
    assert len(losses) == 12
    assert after < losses[0] / 2
    for state, delta in perturbation.deltas.items():
        sizes = delta.norm(dim=-1) if ball == "l2" else delta.abs().amax(dim=-1)
        assert sizes.max() <= radii[state] * (1 + 1e-6)
        # The steps together lead out of every ball, so a missing projection shows.
        assert sizes.max() > 0.9 * radii[state]
        assert delta.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_rows_that_are_inside_are_left_alone() -> None:
    perturbation = some_perturbation(torch.float64)
    before = perturbation.deltas[0].detach().clone()
    with torch.no_grad():
        perturbation.deltas[0][1] *= 100
    perturbation.project()
    after = perturbation.deltas[0].detach()
    assert torch.equal(after[[0, 2, 3, 4]], before[[0, 2, 3, 4]])
    assert torch.allclose(after[1], 3.0 * before[1] / before[1].norm())
