"""Eager oracles: each op as one plain PyTorch expression that autograd differentiates, in any floating dtype.

They are the definition that tests compare with in float64, the ``eager`` implementation, and the benchmarks' plain baseline.
They spend memory freely; use the ops.

Legend: N rows, R selected rows, D width of a hidden state, V vocabulary, L layers, B sequences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import accumulate_dtype


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero and passes no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    nonzero = norm > 0
    return torch.where(nonzero, x / torch.where(nonzero, norm, 1.0), 0.0)


def row_distance_reference(hidden: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Distance of each row, [..., D] and [..., D] (or broadcastable) → [...], in float32 (float64 for float64).

    ``l2`` ‖h−r‖₂ with gradient 0 at 0, ``cosine`` 1−cos(h,r), ``relu_cosine`` relu(cos(h,r)), ``mse`` mean over D of (h−r)².
    A zero vector has cosine 0 and no gradient.
    """
    acc = accumulate_dtype(hidden.dtype)
    h, r = hidden.to(acc), reference.to(acc)
    if kind == "l2":
        return torch.linalg.vector_norm(h - r, dim=-1)
    if kind == "mse":
        return (h - r).square().mean(dim=-1)
    cosine = (_unit(h) * _unit(r)).sum(dim=-1)
    return 1 - cosine if kind == "cosine" else cosine.relu()


def bend_tap_reference(
    hidden: Tensor, reference_rows: Tensor, rows: Tensor, kind: str = "l2", limit: float | None = None
) -> tuple[Tensor, Tensor]:
    """``(hidden, Σ over rows of the distance)``, each at most ``limit`` × ‖r‖; ``reference_rows`` is left as it is."""
    distance = row_distance_reference(hidden.reshape(-1, hidden.shape[-1])[rows], reference_rows, kind)
    if limit is not None:
        distance = torch.minimum(distance, limit * torch.linalg.vector_norm(reference_rows, dim=-1).to(distance.dtype))
    return hidden, distance.sum()


def tap_rows_reference(hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(hidden, hidden's rows)``."""
    return hidden, hidden.reshape(-1, hidden.shape[-1])[rows]


def bend_distance_reference(hidden: Tensor, reference: Tensor, rows: Tensor | None, kind: str, reduction: str = "mean") -> Tensor:
    """Mean or sum of the row distances; 0 for no rows."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    selected = flat if rows is None else flat[rows]
    distance = row_distance_reference(selected, reference.reshape(-1, hidden.shape[-1]), kind)
    return distance.sum() / (max(distance.numel(), 1) if reduction == "mean" else 1)


def window_distance_reference(
    hiddens: Sequence[Tensor], references: Sequence[Tensor], mask: Tensor | None, kind: str, reduction: str = "mean"
) -> Tensor:
    """The stack-and-norm block: mean or sum over layers and masked tokens; 0 where no token is masked in."""
    distance = row_distance_reference(torch.stack(list(hiddens)), torch.stack(list(references)), kind)
    if mask is not None:
        distance = torch.where(mask, distance, 0.0)
    if reduction == "sum":
        return distance.sum()
    count = distance.numel() if mask is None else mask.sum().clamp(min=1) * len(hiddens)
    return distance.sum() / count


def pairwise_cosine_reference(states: Tensor) -> Tensor:
    """Mean over layers of the mean over pairs i ≠ j of ``1 − cos(h_i, h_j)``, through the [L, B, B] matrix."""
    unit = _unit(states.to(accumulate_dtype(states.dtype)))
    cosine = unit @ unit.transpose(-1, -2)
    batch = states.shape[-2]
    pairs = ~torch.eye(batch, dtype=torch.bool, device=states.device)
    return (1 - cosine)[..., pairs].mean()


def head_logits_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float) -> Tensor:
    """Logits [N, V] over the temperature, in float32 (float64 for float64)."""
    acc = accumulate_dtype(hidden.dtype)
    logits = hidden.to(acc) @ weight.to(acc).T
    if bias is not None:
        logits = logits + bias.to(acc)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def linear_kl_div_reference(
    hidden: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    reduction: str = "sum",
    rows: Tensor | None = None,
) -> Tensor:
    """T² Σ over rows of KL(softmax(z_ref/T) ‖ softmax(z/T)), or its mean over rows; 0 for no rows. A word with p = 0 adds 0."""
    hidden = hidden if rows is None else hidden[rows]
    shared = reference_weight is None
    student = head_logits_reference(hidden, weight, bias, softcap, temperature).log_softmax(dim=-1)
    teacher = head_logits_reference(
        reference, weight if reference_weight is None else reference_weight, bias if shared else reference_bias, softcap, temperature
    ).log_softmax(dim=-1)
    probability = teacher.exp()
    total = temperature**2 * (probability * torch.where(probability == 0, 0.0, teacher - student)).sum()
    return total / max(hidden.shape[0], 1) if reduction == "mean" else total


def linear_log_prob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """log softmax(z/T) at ``targets`` for each selected row, [R]; 0 where the target is ``ignore_index``."""
    hidden = hidden if rows is None else hidden[rows]
    ignored = torch.zeros_like(targets, dtype=torch.bool) if ignore_index is None else targets == ignore_index
    # Zeros in place of the rows that are left out, so that what lies there cannot reach the gradient through 0·NaN.
    hidden = torch.where(ignored[:, None], 0.0, hidden)
    log_probs = head_logits_reference(hidden, weight, bias, softcap, temperature).log_softmax(dim=-1)
    picked = log_probs.gather(-1, targets.masked_fill(ignored, 0)[:, None]).squeeze(-1)
    return torch.where(ignored, 0.0, picked)


def keyed_dropout_reference(x: Tensor, keys: Tensor, start: int, threshold: int, factor: float) -> Tensor:
    """``factor·x`` where the element's hash, taken in 64-bit arithmetic, is above the threshold; [..., D].

    ``start`` (the mixed column seed) and ``threshold`` (2³¹ − (1 − p)·2³²) are what the op gets.
    """

    def fold(value: Tensor, shift: int, factor: int, bits: int) -> Tensor:
        """(v ^ v >>> shift)·factor in the low ``bits``; products of int64 wrap."""
        product = (value ^ (value >> shift & (1 << (bits - shift)) - 1)) * factor
        return product if bits == 64 else product & (1 << bits) - 1

    mixed = keys.reshape(*x.shape[:-1], 1) + (0x9E3779B97F4A7C15 - 2**64)
    mixed = fold(fold(mixed, 30, 0xBF58476D1CE4E5B9 - 2**64, 64), 27, 0x94D049BB133111EB - 2**64, 64)
    rows = fold(mixed, 31, 1, 64) >> 32 & 0xFFFFFFFF
    columns = (torch.arange(x.shape[-1], device=x.device) * 0x9E3779B9 + start) & 0xFFFFFFFF
    columns = fold(fold(fold(columns, 16, 0x7FEB352D, 32), 15, 0x846CA68B, 32), 16, 1, 32)
    exchanged = (columns << 16 | columns >> 16) & 0xFFFFFFFF
    hashes = (((rows ^ columns) * 0x7FEB352D & 0xFFFFFFFF) ^ exchanged) * 0x7B935975 & 0xFFFFFFFF
    kept = torch.where(hashes >= 2**31, hashes - 2**32, hashes) > threshold
    return torch.where(kept, x.to(accumulate_dtype(x.dtype)) * factor, 0.0).to(x.dtype)
