"""Eager oracles: each op as one plain PyTorch expression that autograd differentiates, in any floating dtype.

They are the definition that tests compare with in float64, the ``eager`` implementation, and the benchmarks' plain
baseline. They spend memory freely; use the ops.

Legend: N rows, R selected rows, D width of a hidden state, V vocabulary, L layers, B sequences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import accumulate_dtype

__all__ = [
    "bend_distance_reference",
    "bend_tap_reference",
    "dequantize_nf4_reference",
    "gated_product_reference",
    "head_logits_reference",
    "keyed_dropout_reference",
    "linear_kl_div_reference",
    "linear_log_prob_reference",
    "linear_lowered_label_reference",
    "lora_down_reference",
    "lora_up_reference",
    "pairwise_cosine_reference",
    "rms_norm_reference",
    "row_distance_reference",
    "tap_rows_reference",
    "triplet_sums_reference",
    "triplet_tap_reference",
    "triplet_values_reference",
    "window_distance_reference",
]


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero and passes no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    nonzero = norm > 0
    return torch.where(nonzero, x / torch.where(nonzero, norm, 1.0), 0.0)


def row_distance_reference(hidden: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Distance of each row, [..., D] and [..., D] (or broadcastable) → [...], in float32 (float64 for float64).

    ``l2`` ‖h−r‖₂ with gradient 0 at 0, ``cosine`` 1−cos(h,r), ``relu_cosine`` relu(cos(h,r)), ``mse`` mean over D of
    (h−r)². A zero vector has cosine 0 and no gradient.
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


def bend_distance_reference(
    hidden: Tensor, reference: Tensor, rows: Tensor | None, kind: str, reduction: str = "mean"
) -> Tensor:
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


def head_logits_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float
) -> Tensor:
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
    """T² Σ over rows of KL(softmax(z_ref/T) ‖ softmax(z/T)), or its mean over rows; 0 for no rows. A word with p = 0
    adds 0.
    """
    hidden = hidden if rows is None else hidden[rows]
    shared = reference_weight is None
    student = head_logits_reference(hidden, weight, bias, softcap, temperature).log_softmax(dim=-1)
    teacher = head_logits_reference(
        reference,
        weight if reference_weight is None else reference_weight,
        bias if shared else reference_bias,
        softcap,
        temperature,
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


def linear_lowered_label_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lowered: float,
    reference: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of each row, [N], to softmax(z_ref − lowered · 1[label]); z_ref are ``hidden``'s own logits, as a
    constant, where there is no ``reference``.
    """
    logits = head_logits_reference(hidden, weight, bias, softcap, 1.0)
    known = logits.detach() if reference is None else head_logits_reference(reference, weight, bias, softcap, 1.0)
    label = torch.zeros_like(known).scatter(-1, labels[:, None], 1.0).bool()
    target = torch.where(label, known - lowered, known).softmax(dim=-1)
    return -(target * torch.where(target == 0, 0.0, logits.log_softmax(dim=-1))).sum(dim=-1)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, gemma: bool = False) -> Tensor:
    """Rows over the root of their mean square, times the weight (1 + weight for Gemma's), in float32 (float64 for
    float64).

    As in transformers' layers the normed row is rounded to ``x``'s dtype before the weight comes, for Gemma's
    afterwards.
    """
    wide = x.to(accumulate_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * (1 + weight.to(wide.dtype))).to(x.dtype) if gemma else weight * normed.to(x.dtype)


def gated_product_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def lora_down_reference(
    x: Tensor, a: Tensor, hashes: Tensor | None, start: int = 0, threshold: int = 0
) -> tuple[Tensor, Tensor]:
    """``(x, (keep · x) Aᵀ)``, the product in float32 (float64 for float64); ``start`` and ``threshold`` as
    for dropout.
    """
    acc = accumulate_dtype(x.dtype)
    masked = (
        x
        if hashes is None
        else torch.where(_kept(hashes[:, None].to(torch.int64) & 0xFFFFFFFF, x.shape[-1], start, threshold), x, 0.0)
    )
    return x, masked.to(acc) @ a.to(acc).T


def lora_up_reference(result: Tensor, down: Tensor, b: Tensor, factor: float) -> Tensor:
    """``result`` + factor · P Bᵀ, rounded once."""
    return (result.to(down.dtype) + factor * (down @ b.to(down.dtype).T)).to(result.dtype)


def dequantize_nf4_reference(
    packed: Tensor, table: Tensor, scales: Tensor, shape: tuple[int, int], block: int, dtype: torch.dtype
) -> Tensor:
    """table[bits] · scale of the weight's block, the upper half of each byte first; ``scales`` [blocks]."""
    codes = packed.reshape(-1).long()
    values = table[torch.stack((codes >> 4, codes & 15), dim=1)].reshape(-1)
    return (values * scales.repeat_interleave(block)[: values.numel()]).to(dtype).view(shape)


def triplet_values_reference(
    hidden: Tensor,
    reference: Tensor,
    rows: tuple[Tensor, Tensor],
    center: Tensor,
    margins: tuple[float, float],
    unit: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """Values before the ReLU of the safe rows and of the unsafe ones, [R] each, around ``center`` [D] of any length."""
    acc = accumulate_dtype(hidden.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1]).to(acc)
    safe, unsafe = flat[rows[0]], flat[rows[1]]
    kept, bent = reference.to(acc).split([rows[0].shape[0], rows[1].shape[0]])
    toward = _unit(center)
    away = (
        1 - (_unit(safe) * _unit(kept)).sum(dim=-1)
        if unit is None
        else torch.linalg.vector_norm(safe - kept, dim=-1) / unit
    )
    return away - 1 + _unit(safe) @ toward + margins[0], (_unit(unsafe) * _unit(bent)).sum(dim=-1) - _unit(
        unsafe
    ) @ toward + margins[1]


def triplet_tap_reference(
    hidden: Tensor,
    reference: Tensor,
    rows: tuple[Tensor, Tensor],
    weights: tuple[float, float],
    margins: tuple[float, float],
    unit: float | None = 1.0,
    unsafe_rows: int | None = None,
    unsafe_sum: Tensor | None = None,
    active: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """``(hidden, Σ over both halves of weight · Σ relu(v), the two sums without their weights)``; ``reference`` is left
    as it is.

    Without ``unsafe_sum`` m is the mean of these unsafe rows, and differentiated as such. With the sums over a whole
    batch (``TripletSums``) m is given, and its gradient reaches these rows through a term of value 0.
    """
    acc = accumulate_dtype(hidden.dtype)
    unsafe = hidden.reshape(-1, hidden.shape[-1])[rows[1]].to(acc)
    count = max(1, rows[1].shape[0] if unsafe_rows is None else unsafe_rows)
    mean = unsafe.sum(dim=0) / count
    if unsafe_sum is not None and active is not None:
        known = unsafe_sum / count
        length, toward = torch.linalg.vector_norm(known), _unit(known)
        pull = weights[0] * active[0] - weights[1] * active[1]
        pull = (
            torch.where(length > 0, (pull - toward * (toward @ pull)) / torch.where(length > 0, length, 1.0), 0.0)
            / count
        )
        mean, through = known, (unsafe @ pull).sum()
        through = through - through.detach()
    else:
        through = torch.zeros((), dtype=acc, device=hidden.device)
    values = triplet_values_reference(hidden, reference, rows, mean, margins, unit)
    sums = (values[0].relu().sum(), values[1].relu().sum())
    return hidden, weights[0] * sums[0] + weights[1] * sums[1] + through, (sums[0].detach(), sums[1].detach())


def triplet_sums_reference(
    hidden: Tensor,
    rows: tuple[Tensor, Tensor],
    reference: Tensor | None = None,
    center: Tensor | None = None,
    margins: tuple[float, float] = (0.0, 0.0),
    unit: float | None = 1.0,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``(Σ h of the unsafe rows, Σ ĥ of each half's)``; with references the second counts the rows whose value is above
    0.
    """
    flat = hidden.reshape(-1, hidden.shape[-1]).to(accumulate_dtype(hidden.dtype))
    safe, unsafe = (_unit(flat[part]) for part in rows)
    if reference is not None and center is not None:
        values = triplet_values_reference(hidden, reference, rows, center, margins, unit)
        safe, unsafe = (torch.where(value[:, None] > 0, half, 0.0) for half, value in zip((safe, unsafe), values))
    return flat[rows[1]].sum(dim=0), (safe.sum(dim=0), unsafe.sum(dim=0))


def _fold(value: Tensor, shift: int, factor: int, bits: int) -> Tensor:
    """(v ^ v >>> shift)·factor in the low ``bits``; products of int64 wrap."""
    product = (value ^ (value >> shift & (1 << (bits - shift)) - 1)) * factor
    return product if bits == 64 else product & (1 << bits) - 1


def _kept(rows: Tensor, width: int, start: int, threshold: int) -> Tensor:
    """Where the element's hash is above the threshold, [..., width]; ``rows`` [..., 1] are the rows' hashes, in 0 … 2³²
    − 1.
    """
    columns = (torch.arange(width, device=rows.device) * 0x9E3779B9 + start) & 0xFFFFFFFF
    columns = _fold(_fold(_fold(columns, 16, 0x7FEB352D, 32), 15, 0x846CA68B, 32), 16, 1, 32)
    exchanged = (columns << 16 | columns >> 16) & 0xFFFFFFFF
    hashes = (((rows ^ columns) * 0x7FEB352D & 0xFFFFFFFF) ^ exchanged) * 0x7B935975 & 0xFFFFFFFF
    return torch.where(hashes >= 2**31, hashes - 2**32, hashes) > threshold


def keyed_dropout_reference(x: Tensor, keys: Tensor, start: int, threshold: int, factor: float) -> Tensor:
    """``factor·x`` where the element's hash, taken in 64-bit arithmetic, is above the threshold; [..., D].

    ``start`` (the mixed column seed) and ``threshold`` (2³¹ − (1 − p)·2³²) are what the op gets.
    """
    mixed = keys.reshape(*x.shape[:-1], 1) + (0x9E3779B97F4A7C15 - 2**64)
    mixed = _fold(_fold(mixed, 30, 0xBF58476D1CE4E5B9 - 2**64, 64), 27, 0x94D049BB133111EB - 2**64, 64)
    rows = _fold(mixed, 31, 1, 64) >> 32 & 0xFFFFFFFF
    kept = _kept(rows, x.shape[-1], start, threshold)
    return torch.where(kept, x.to(accumulate_dtype(x.dtype)) * factor, 0.0).to(x.dtype)
