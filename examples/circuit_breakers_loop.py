"""A Circuit-Breakers-style training loop in which one call replaces the stack, mask and norm block.

    python examples/circuit_breakers_loop.py

Retain states stay (distance in every hidden state), forget states turn away from their own direction (relu of the
cosine in two layers), and the weight moves from the second to the first over the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from repbend_kernels import window_distance
from tiny_model import batch, build
from torch import Tensor

TARGET_LAYERS = (2, 3)
STRENGTH = 5.0


def states(model: torch.nn.Module, ids: Tensor) -> Sequence[Tensor]:
    """All hidden states of a pass."""
    return model(ids, output_hidden_states=True).hidden_states


def reference_states(model: torch.nn.Module, ids: Tensor) -> Sequence[Tensor]:
    """The same without the adapter and without a graph."""
    with torch.no_grad(), model.disable_adapter():
        return states(model, ids)


def terms(
    model: torch.nn.Module, retain: tuple[Tensor, Tensor], forget: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """``(retain, forget)``: the published means over layers and real tokens."""
    (retain_ids, retain_mask), (forget_ids, forget_mask) = retain, forget
    references = reference_states(model, retain_ids)
    # Instead of torch.stack on both tuples, mask.repeat, two products and torch.norm:
    retain_term = window_distance(states(model, retain_ids), references, retain_mask)
    hidden, reference = states(model, forget_ids), reference_states(model, forget_ids)
    picked = [[h[layer] for layer in TARGET_LAYERS] for h in (hidden, reference)]
    forget_term = window_distance(picked[0], picked[1], forget_mask, kind="relu_cosine")
    return retain_term, forget_term


def main(steps: int = 15) -> list[tuple[float, float]]:
    """Trains on the tiny model and returns (retain, forget) of each step."""
    model = build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    history = []
    for step in range(steps):
        retain_term, forget_term = terms(model, batch(step), batch(1000 + step))
        progress = step / (2 * steps)
        loss = STRENGTH * (progress * retain_term + (1 - progress) * forget_term)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((retain_term.item(), forget_term.item()))
    return history


if __name__ == "__main__":
    for step, (retain, forget) in enumerate(main()):
        print(f"step {step:2d}  retain {retain:.4f}  forget {forget:.4f}")
