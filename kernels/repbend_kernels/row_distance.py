"""Per-row distances between hidden and reference states, and their gradients: the arithmetic behind the distance ops.

For one row, with h, r of width D in float32 (float64 for float64), d the distance and g = d d/d h its direction:

    l2           d = ‖h−r‖₂            g = (h−r)/d, 0 where d = 0
    mse          d = ‖h−r‖²/D          g = 2(h−r)/D
    cosine       d = 1 − c             g = −(r/(‖h‖‖r‖) − c·h/‖h‖²)
    relu_cosine  d = max(c, 0)         g = r/(‖h‖‖r‖) − c·h/‖h‖² where c > 0, else 0

c = h·r/(‖h‖‖r‖), clamped to [−1, 1]; a zero vector has c = 0 and g = 0.

Two forms: ``*_torch`` works in blocks of rows with a fixed scratch; ``triton.row_distance`` holds the kernels.

Legend: N rows of the tensor, R selected rows (R = N where ``rows`` is None), D width.
"""

import torch
from torch import Tensor

from .checks import accumulate_dtype
from .rows import RowReader, blocks, count_rows


def _distance_block(h: Tensor, r: Tensor, kind: str) -> Tensor:
    """Distances [n] of one block, h and r in the accumulation dtype."""
    if kind in ("l2", "mse"):
        norm = torch.linalg.vector_norm(h - r, dim=-1)
        return norm if kind == "l2" else norm.square_().div_(h.shape[-1])
    cosine, _, _ = _cosine_block(h, r)
    return 1 - cosine if kind == "cosine" else cosine.relu_()


def _cosine_block(h: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(c, 1/‖h‖, 1/‖r‖)``, each [n]; the inverse of a zero norm is 0."""
    inverse_h, inverse_r = (
        torch.where(n > 0, n.reciprocal(), 0.0) for n in (torch.linalg.vector_norm(x, dim=-1) for x in (h, r))
    )
    dot = (h * r).sum(dim=-1)
    return (dot * inverse_h * inverse_r).clamp_(-1, 1), inverse_h, inverse_r


def _direction_block(h: Tensor, r: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``(distances [n], directions [n, D])`` of one block."""
    if kind in ("l2", "mse"):
        difference = h - r
        norm = torch.linalg.vector_norm(difference, dim=-1)
        if kind == "mse":
            return norm.square_().div_(h.shape[-1]), difference.mul_(2 / h.shape[-1])
        return norm, difference.mul_(torch.where(norm > 0, norm.reciprocal(), 0.0)[:, None])
    cosine, inverse_h, inverse_r = _cosine_block(h, r)
    sign = -1.0 if kind == "cosine" else (cosine > 0).to(h.dtype)
    # A zero reference has c = 0 and inverse 0, so both factors vanish with it.
    toward_r = (inverse_h * inverse_r * sign)[:, None]
    toward_h = (cosine * inverse_h.square() * -sign)[:, None]
    direction = torch.addcmul(r * toward_r, h, toward_h)
    return (1 - cosine if kind == "cosine" else cosine.relu_()), direction


def _references(reference: Tensor, count: int, acc: torch.dtype) -> RowReader:
    if reference.shape[0] == 1 and reference.dim() == 2 and count != 1:
        return RowReader(reference.to(acc).expand(count, reference.shape[-1]))
    return RowReader(reference)


def distances_torch(hidden: Tensor, reference: Tensor, rows: Tensor | None, mask: Tensor | None, kind: str) -> Tensor:
    """Row distances [R]; 0 where ``mask`` (bool, N elements) is False.

    ``reference`` is [R, D], [1, D] (every row's reference), or of ``hidden``'s shape.
    """
    acc = accumulate_dtype(hidden.dtype)
    count = count_rows(hidden) if rows is None else rows.shape[0]
    out = torch.empty(count, dtype=acc, device=hidden.device)
    h_rows, r_rows = RowReader(hidden, rows), _references(reference, count, acc)
    for start, stop in blocks(count, hidden.shape[-1], hidden.device):
        out[start:stop] = _distance_block(h_rows.read(start, stop).to(acc), r_rows.read(start, stop).to(acc), kind)
    return out if mask is None else torch.where(mask.reshape(-1), out, 0.0)


def distances_into_direction_torch(
    hidden: Tensor, reference: Tensor, rows: Tensor | None, mask: Tensor | None, kind: str, direction: Tensor
) -> Tensor:
    """As :func:`distances_torch`, and ``direction`` ([R, D] or of ``hidden``'s shape, may be ``reference``)
    receives g.
    """
    acc = accumulate_dtype(hidden.dtype)
    count = count_rows(hidden) if rows is None else rows.shape[0]
    out = torch.empty(count, dtype=acc, device=hidden.device)
    h_rows, r_rows = RowReader(hidden, rows), _references(reference, count, acc)
    target = direction.view(count, direction.shape[-1])
    keep = None if mask is None else mask.reshape(-1)
    for start, stop in blocks(count, hidden.shape[-1], hidden.device):
        distance, g = _direction_block(h_rows.read(start, stop).to(acc), r_rows.read(start, stop).to(acc), kind)
        if keep is not None:
            block = keep[start:stop]
            distance, g = torch.where(block, distance, 0.0), torch.where(block[:, None], g, 0.0)
        out[start:stop] = distance
        target[start:stop] = g
    return out


def gradient_torch(
    hidden: Tensor, reference: Tensor, rows: Tensor | None, mask: Tensor | None, kind: str, grad_rows: Tensor
) -> Tensor:
    """Σ grad_rows · d distance/d hidden as a new tensor of ``hidden``'s shape; rows outside the selection are 0."""
    acc = accumulate_dtype(hidden.dtype)
    count = count_rows(hidden) if rows is None else rows.shape[0]
    allocate = torch.empty if rows is None else torch.zeros
    out = allocate(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    flat = out.view(count_rows(hidden), hidden.shape[-1])
    h_rows, r_rows = RowReader(hidden, rows), _references(reference, count, acc)
    keep = None if mask is None else mask.reshape(-1)
    for start, stop in blocks(count, hidden.shape[-1], hidden.device):
        _, g = _direction_block(h_rows.read(start, stop).to(acc), r_rows.read(start, stop).to(acc), kind)
        g.mul_(grad_rows[start:stop, None])
        if keep is not None:
            g = torch.where(keep[start:stop, None], g, 0.0)
        if rows is None:
            flat[start:stop] = g
        else:
            flat.index_copy_(0, rows[start:stop], g.to(out.dtype))
    return out


def add_rows_torch(grad: Tensor | None, addend: Tensor, rows: Tensor, scale: Tensor | None, shape: list[int]) -> Tensor:
    """New contiguous tensor of ``shape``: ``grad`` (zeros where None) plus ``scale``·``addend`` [R, D] at ``rows``."""
    acc = accumulate_dtype(addend.dtype)
    if grad is None:
        out = torch.zeros(shape, dtype=addend.dtype, device=addend.device)
    else:
        out = grad.clone(memory_format=torch.contiguous_format)
    flat = out.view(-1, shape[-1])
    for start, stop in blocks(rows.shape[0], shape[-1], rows.device):
        index = rows[start:stop]
        block = addend[start:stop].to(acc)
        if scale is not None:
            block = block * scale
        if grad is not None:
            block = block + flat.index_select(0, index)
        flat.index_copy_(0, index, block.to(out.dtype))
    return out
