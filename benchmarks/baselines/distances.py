"""Distance baselines: the expressions of the public research code, and a loop over layers in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def published_row_distance(hidden: Tensor, reference_rows: Tensor, rows: Tensor) -> Tensor:
    """Σ ‖h−r‖₂ over selected rows as the published step takes it: gather, subtract, norm with a float32 sum."""
    selected = hidden.reshape(-1, hidden.shape[-1])[rows]
    return torch.norm(selected - reference_rows, dim=-1, p=2, dtype=torch.float).sum()


def published_window_distance(hiddens: Sequence[Tensor], references: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The stack, mask and norm block of Circuit Breakers and RepBend: mean over layers and masked tokens."""
    reference = torch.stack(list(references)).detach()
    hidden = torch.stack(list(hiddens))
    layer_mask = mask.repeat(len(hiddens), *[1] * mask.dim()).unsqueeze(-1)
    distance = torch.norm(hidden * layer_mask - reference * layer_mask, dim=-1, p=2, dtype=torch.float)
    return distance.sum() / (mask.sum() * len(hiddens))


def looped_window_distance(hiddens: Sequence[Tensor], references: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The same without the stack: one layer after the other, summed by autograd."""
    total = hiddens[0].new_zeros((), dtype=torch.float32)
    for hidden, reference in zip(hiddens, references):
        total = (
            total
            + torch.where(mask, torch.linalg.vector_norm(hidden - reference, dim=-1, dtype=torch.float), 0.0).sum()
        )
    return total / (mask.sum() * len(hiddens))


def published_pairwise_cosine(states: Tensor) -> Tensor:
    """Mean of 1 − cos over pairs i ≠ j per layer, from all B×B cosines."""
    terms = []
    for layer in states:
        cosine = torch.nn.functional.cosine_similarity(layer[:, None], layer[None], dim=-1)
        off_diagonal = ~torch.eye(layer.shape[0], dtype=torch.bool, device=layer.device)
        terms.append((1 - cosine)[off_diagonal].mean())
    return torch.stack(terms).mean()
