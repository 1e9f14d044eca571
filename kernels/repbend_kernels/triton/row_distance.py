"""Triton kernels of the distance ops: one program per row, one launch per tap and direction. Equations in
``row_distance``.

A row of up to ``WHOLE_ROW`` elements is read once and kept in registers; a wider one is walked in blocks, twice where a
direction is written. Offsets are int64: rows × width passes 2³¹ at 16k rows of 256k elements, and columns
× stride in a transposed view of as many.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import RowAddress, addressable, on_device_of, size_rule
from ..rows import count_rows
from .parts import inverse_root, row_start

__all__ = [
    "DIRECTION",
    "GRADIENT",
    "NONE",
    "WHOLE_REGISTERS",
    "WHOLE_ROW",
    "add_rows_kernel",
    "row_distance_kernel",
    "size_rule",
]

WHOLE_ROW = 8192
WHOLE_REGISTERS = 64
"""Of a thread that holds 16 elements of both rows. Left alone, ptxas may aim at 48 and spill."""
NONE, DIRECTION, GRADIENT = 0, 1, 2


@triton.jit
def _coefficients(
    s0: tl.tensor, s1: tl.tensor, s2: tl.tensor, width: tl.tensor, KIND: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """From the row's sums: ``(distance, a, b)`` with direction a·(h−r) for l2 and mse, a·h + b·r for the cosines."""
    if KIND == "l2":
        distance = tl.sqrt_rn(s0)
        a = tl.where(distance > 0, 1.0 / distance, 0.0)
        b = 0.0
    elif KIND == "mse":
        distance = s0 / width
        a = 2.0 / width
        b = 0.0
    else:
        inverse_h = inverse_root(s1)
        inverse_r = inverse_root(s2)
        # A GPU's own maximum takes the number of a number and a NaN; a row with a NaN must not look near or far.
        cosine = tl.maximum(s0 * inverse_h * inverse_r, -1.0, propagate_nan=tl.PropagateNan.ALL)
        cosine = tl.minimum(cosine, 1.0, propagate_nan=tl.PropagateNan.ALL)
        if KIND == "cosine":
            distance = 1.0 - cosine
            sign = -1.0
        else:
            distance = tl.maximum(cosine, 0.0, propagate_nan=tl.PropagateNan.ALL)
            sign = tl.where(cosine > 0, 1.0, 0.0)
        a = -sign * cosine * inverse_h * inverse_h
        b = sign * inverse_h * inverse_r
    return distance, a, b


@triton.jit
def _direction(h: tl.tensor, r: tl.tensor, a: tl.tensor, b: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == "l2" or KIND == "mse":
        g = (h - r) * a
    else:
        g = h * a + r * b
    return g


@triton.jit
def _selected(
    rows: tl.tensor, mask: tl.tensor, i: tl.tensor, count_n: tl.tensor, HAS_ROWS: tl.constexpr, HAS_MASK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """``(n, known, keep)``: the row that program i reads, whether there is one, and whether the mask keeps it too."""
    n = i
    known = True
    if HAS_ROWS:
        n = tl.load(rows + i)
        known = (n >= 0) & (n < count_n)
    keep = known
    if HAS_MASK:
        keep &= tl.load(mask + i) != 0
    return n, known, keep


@triton.jit
def _read(
    h_row: tl.tensor, r_row: tl.tensor, columns: tl.tensor, h_stride: tl.tensor, r_stride: tl.tensor, inside: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    h = tl.load(h_row + columns.to(tl.int64) * h_stride, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(r_row + columns.to(tl.int64) * r_stride, mask=inside, other=0.0).to(tl.float32)
    return h, r


@triton.jit
def _products(h: tl.tensor, r: tl.tensor, KIND: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What a row's sums are over; ``_coefficients`` of l2 and mse reads the first alone."""
    if KIND == "l2" or KIND == "mse":
        return (h - r) * (h - r), h, r
    else:
        return h * r, h * h, r * r


@triton.jit
def _sums(
    h_row: tl.tensor,
    r_row: tl.tensor,
    h_stride: tl.tensor,
    r_stride: tl.tensor,
    width: tl.tensor,
    keep: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A wide row's sums, block by block."""
    columns = tl.arange(0, BLOCK)
    s0 = tl.zeros([BLOCK], dtype=tl.float32)
    s1 = tl.zeros([BLOCK], dtype=tl.float32)
    s2 = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        offsets = start + columns
        h, r = _read(h_row, r_row, offsets, h_stride, r_stride, (offsets < width) & keep)
        p0, p1, p2 = _products(h, r, KIND)
        s0 += p0
        s1 += p1
        s2 += p2
    return s0, s1, s2


@triton.jit
def _target_row(
    i: tl.tensor,
    n: tl.tensor,
    keep: tl.tensor,
    grad_rows: tl.tensor,
    grad_stride: tl.tensor,
    HAS_ROWS: tl.constexpr,
    STORE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """``(row of target, factor of the direction, whether it is written)``."""
    row = i
    factor = 1.0
    writable = True
    if STORE == 2:
        row = n
        factor = tl.load(grad_rows + i * grad_stride).to(tl.float32)
        if HAS_ROWS:
            writable = keep
    return row, factor, writable


@triton.jit
def _store(
    out: tl.tensor,
    h: tl.tensor,
    r: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    factor: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    writable: tl.tensor,
    KIND: tl.constexpr,
) -> None:
    g = _direction(h, r, a, b, KIND) * factor
    tl.store(out + columns, g.to(out.dtype.element_ty), mask=(columns < width) & writable)


@triton.jit
def _store_wide(
    out: tl.tensor,
    h_row: tl.tensor,
    r_row: tl.tensor,
    h_stride: tl.tensor,
    r_stride: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    factor: tl.tensor,
    width: tl.tensor,
    keep: tl.tensor,
    writable: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A wide row's direction, which reads the row again."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        offsets = start + columns
        h, r = _read(h_row, r_row, offsets, h_stride, r_stride, (offsets < width) & keep)
        _store(out, h, r, a, b, factor, offsets, width, writable, KIND)


# Counts of rows and where a row's scalars begin change with every batch: specialised on them, kernels would compile
# again in the middle of a run.
@triton.jit(
    do_not_specialize=["count_n", "h_inner", "r_inner"],
    do_not_specialize_on_alignment=["rows", "mask", "grad_rows", "distances", "place"],
)
def row_distance_kernel(
    hidden: tl.tensor,
    reference: tl.tensor,
    rows: tl.tensor,
    mask: tl.tensor,
    grad_rows: tl.tensor,
    distances: tl.tensor,
    target: tl.tensor,
    place: tl.tensor,
    count_n: tl.tensor,
    width: tl.tensor,
    h_inner: tl.tensor,
    h_outer_stride: tl.tensor,
    h_inner_stride: tl.tensor,
    h_stride: tl.tensor,
    r_inner: tl.tensor,
    r_outer_stride: tl.tensor,
    r_inner_stride: tl.tensor,
    r_stride: tl.tensor,
    grad_stride: tl.tensor,
    KIND: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PLACE: tl.constexpr,
    H_FLAT: tl.constexpr,
    R_FLAT: tl.constexpr,
    STORE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """STORE 0: distances. 1: distances, and the direction at row i of target. 2: grad · direction at row n of it."""
    i = tl.program_id(0).to(tl.int64)
    n, known, keep = _selected(rows, mask, i, count_n, HAS_ROWS, HAS_MASK)
    # Inputs are read before place or target is written: target may be the reference's memory.
    h_row = row_start(hidden, n, h_inner, h_outer_stride, h_inner_stride, H_FLAT)
    r_row = row_start(reference, i, r_inner, r_outer_stride, r_inner_stride, R_FLAT)
    columns = tl.arange(0, BLOCK)
    if WHOLE:
        h, r = _read(h_row, r_row, columns, h_stride, r_stride, (columns < width) & keep)
        s0, s1, s2 = _products(h, r, KIND)
    else:
        s0, s1, s2 = _sums(h_row, r_row, h_stride, r_stride, width, keep, KIND, BLOCK)
    distance, a, b = _coefficients(tl.sum(s0, 0), tl.sum(s1, 0), tl.sum(s2, 0), width, KIND)
    if HAS_MASK:
        distance = tl.where(keep, distance, 0.0)
    if HAS_ROWS:
        distance = tl.where(known, distance, float("nan"))
    if STORE != 2:
        tl.store(distances + i, distance)
    if HAS_PLACE:
        tl.store(place + n, i.to(tl.int32), mask=keep)
    if STORE != 0:
        row, factor, writable = _target_row(i, n, keep, grad_rows, grad_stride, HAS_ROWS, STORE)
        out = target + row * width
        if WHOLE:
            _store(out, h, r, a, b, factor, columns, width, writable, KIND)
        else:
            _store_wide(out, h_row, r_row, h_stride, r_stride, a, b, factor, width, keep, writable, KIND, BLOCK)


@triton.jit(do_not_specialize=["count_r", "g_inner"], do_not_specialize_on_alignment=["rows", "place", "scale"])
def add_rows_kernel(
    grad: tl.tensor,
    direction: tl.tensor,
    rows: tl.tensor,
    place: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    count_r: tl.tensor,
    width: tl.tensor,
    g_inner: tl.tensor,
    g_outer_stride: tl.tensor,
    g_inner_stride: tl.tensor,
    g_stride: tl.tensor,
    HAS_GRAD: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out[n] = grad[n] + scale · direction[i] where rows[i] = n.

    ``place[n]`` holds i for selected rows and anything at all for others, so it counts only if ``rows[place[n]]`` is n:
    no launch has to clear it.
    """
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_GRAD:
        # Asked for before the two loads that find the direction's row, which have to wait for each other.
        row = row_start(grad, n, g_inner, g_outer_stride, g_inner_stride, FLAT)
        value = tl.load(row + columns.to(tl.int64) * g_stride, mask=inside, other=0.0).to(tl.float32)
    i = tl.load(place + n).to(tl.int64)
    selected = (i >= 0) & (i < count_r)
    selected = selected & (tl.load(rows + i, mask=selected, other=-1) == n)
    added = tl.load(direction + i * width + columns, mask=inside & selected, other=0.0).to(tl.float32)
    if HAS_SCALE:
        added *= tl.load(scale).to(tl.float32)
    value += tl.where(selected, added, 0.0)
    tl.store(out + n * width + columns, value.to(out.dtype.element_ty), mask=inside)


def _launch_rows(
    hidden: Tensor,
    reference: Tensor,
    rows: Tensor | None,
    mask: Tensor | None,
    kind: str,
    *,
    distances: Tensor | None = None,
    target: Tensor | None = None,
    place: Tensor | None = None,
    grad_rows: Tensor | None = None,
) -> None:
    count_n, width = count_rows(hidden), hidden.shape[-1]
    count = count_n if rows is None else rows.shape[0]
    if count == 0:
        return
    hidden, h = addressable(hidden)
    broadcast = reference.dim() == 2 and reference.shape[0] == 1 and count != 1
    reference, r = addressable(reference)
    if broadcast:
        r = RowAddress(0, 0, 0, r.element_stride)
    launch = size_rule(width, WHOLE_ROW)
    whole = width <= WHOLE_ROW
    store = NONE if target is None else DIRECTION if grad_rows is None else GRADIENT
    unused = hidden
    with on_device_of(hidden):
        row_distance_kernel[(count,)](
            hidden,
            reference,
            unused if rows is None else rows.contiguous(),
            unused if mask is None else mask.reshape(-1).contiguous().view(torch.uint8),
            unused if grad_rows is None else grad_rows,
            unused if distances is None else distances,
            unused if target is None else target,
            unused if place is None else place,
            count_n,
            width,
            *h,
            *r,
            0 if grad_rows is None else grad_rows.stride(0),
            KIND=kind,
            HAS_ROWS=rows is not None,
            HAS_MASK=mask is not None,
            HAS_PLACE=place is not None,
            H_FLAT=h.flat,
            R_FLAT=r.flat,
            STORE=store,
            WHOLE=whole,
            BLOCK=launch.block if whole else WHOLE_ROW // 2,
            num_warps=launch.warps if whole else 8,
            **({"maxnreg": WHOLE_REGISTERS} if whole and torch.version.hip is None else {}),
        )


def _row_scalars(hidden: Tensor, layers: int, rows: Tensor | None) -> Tensor:
    count = count_rows(hidden) if rows is None else rows.shape[0]
    return torch.empty((layers, count), dtype=torch.float32, device=hidden.device)


def launch_distances(
    hiddens: list[Tensor], references: list[Tensor], rows: Tensor | None, mask: Tensor | None, kind: str
) -> Tensor:
    """Distances [L, R], one launch per layer."""
    out = _row_scalars(hiddens[0], len(hiddens), rows)
    for distances, hidden, reference in zip(out, hiddens, references):
        _launch_rows(hidden, reference, rows, mask, kind, distances=distances)
    return out


def launch_consume(hiddens: list[Tensor], references: list[Tensor], mask: Tensor | None, kind: str) -> Tensor:
    """Distances [L, N]; each reference becomes the direction."""
    out = _row_scalars(hiddens[0], len(hiddens), None)
    for distances, hidden, reference in zip(out, hiddens, references):
        _launch_rows(hidden, reference, None, mask, kind, distances=distances, target=reference)
    return out


def launch_gradient(
    hidden: Tensor, reference: Tensor, rows: Tensor | None, mask: Tensor | None, kind: str, grad_rows: Tensor
) -> Tensor:
    """``grad_rows`` · direction in a new tensor of ``hidden``'s shape."""
    allocate = torch.empty if rows is None else torch.zeros
    out = allocate(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    _launch_rows(hidden, reference, rows, mask, kind, target=out, grad_rows=grad_rows)
    return out


def launch_tap_forward(
    hidden: Tensor, buffer: Tensor, broadcast: Tensor | None, rows: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """``(distances [R], place [N])``; ``buffer`` becomes the direction."""
    distances = _row_scalars(hidden, 1, rows)[0]
    place = torch.empty(count_rows(hidden), dtype=torch.int32, device=hidden.device)
    reference = buffer if broadcast is None else broadcast
    _launch_rows(hidden, reference, rows, None, kind, distances=distances, target=buffer, place=place)
    return distances, place


def launch_tap_backward(
    grad: Tensor | None, direction: Tensor, rows: Tensor, place: Tensor, scale: Tensor | None, shape: list[int]
) -> Tensor:
    """``grad`` + ``scale`` (1 where None) · ``direction`` at ``rows`` in a new tensor of ``shape``."""
    out = torch.empty(shape, dtype=direction.dtype, device=direction.device)
    width, count_n = shape[-1], place.shape[0]
    if count_n == 0:
        return out
    source, address = (direction, RowAddress(0, 0, 0, 1)) if grad is None else addressable(grad)
    launch = size_rule(width, WHOLE_ROW // 2)
    with on_device_of(out):
        add_rows_kernel[(count_n, triton.cdiv(width, launch.block))](
            source,
            direction,
            rows.contiguous(),
            place,
            direction if scale is None else scale,
            out,
            rows.shape[0],
            width,
            *address,
            HAS_GRAD=grad is not None,
            HAS_SCALE=scale is not None,
            FLAT=address.flat,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )
    return out
