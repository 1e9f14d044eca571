"""KL distillation from the same model with its adapter off, through ``linear_kl_div``: no logits of either pass are
kept.

    python examples/distill_from_own_base.py

The adapter learns new sequences; the KL term keeps its next-token distribution on other text where the base model has
it.
"""

from __future__ import annotations

import torch
from repbend_kernels import linear_kl_div, linear_log_prob
from tiny_model import batch, build
from torch import Tensor

KL_WEIGHT, TEMPERATURE = 50.0, 2.0


def rows(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """States [N, H] that predict a real token, and the ids of those tokens are ``ids[:, 1:][mask[:, 1:]]``."""
    return model.get_base_model().model(ids).last_hidden_state[:, :-1][mask[:, 1:]]


def kl_to_base(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean T²·KL(base ‖ adapted) over real tokens."""
    with torch.no_grad(), model.disable_adapter():
        reference = rows(model, ids, mask)
    head = model.get_base_model().lm_head.weight
    return linear_kl_div(rows(model, ids, mask), reference, head.detach(), temperature=TEMPERATURE, reduction="mean")


def negative_log_likelihood(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens, from the states and the head."""
    head = model.get_base_model().lm_head.weight
    return -linear_log_prob(rows(model, ids, mask), head.detach(), ids[:, 1:][mask[:, 1:]]).mean()


def main(steps: int = 20, kl_weight: float = KL_WEIGHT) -> list[tuple[float, float]]:
    """Trains on the tiny model and returns (negative log-likelihood, KL) of each step."""
    model = build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for step in range(steps):
        learned = negative_log_likelihood(model, *batch(1))
        kept = kl_to_base(model, *batch(100 + step))
        optimizer.zero_grad()
        (learned + kl_weight * kept).backward()
        optimizer.step()
        history.append((learned.item(), kept.item()))
    return history


if __name__ == "__main__":
    for step, (learned, kept) in enumerate(main()):
        print(f"step {step:2d}  nll {learned:.4f}  kl {kept:.5f}")
