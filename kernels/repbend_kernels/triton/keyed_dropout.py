"""Triton kernel of ``keyed_dropout``: a tile of rows and columns; a row's and a column's hash are made once for the
tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..keyed_dropout import FIRST, LAST, SECOND, WEYL
from ..launch import addressable, on_device_of
from .parts import row_start

__all__ = ["COLUMNS", "ROWS", "WARPS", "keyed_dropout_kernel"]

ROWS = 4
COLUMNS = 1024
WARPS = 4

_FIRST, _SECOND, _LAST, _WEYL = tl.constexpr(FIRST), tl.constexpr(SECOND), tl.constexpr(LAST), tl.constexpr(WEYL)


@triton.jit
def row_hash(key: tl.tensor) -> tl.tensor:
    """High 32 bits of splitmix64."""
    mixed = key.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    return ((mixed ^ (mixed >> 31)) >> 32).to(tl.uint32)


@triton.jit
def column_hash(column: tl.tensor, start: tl.tensor) -> tl.tensor:
    """fmix32(start + column·0x9E3779B9)."""
    mixed = column.to(tl.uint32) * tl.full([], _WEYL, tl.uint32) + start.to(tl.uint32)
    mixed = (mixed ^ (mixed >> 16)) * tl.full([], _FIRST, tl.uint32)
    mixed = (mixed ^ (mixed >> 15)) * tl.full([], _SECOND, tl.uint32)
    return mixed ^ (mixed >> 16)


@triton.jit
def element_hash(row: tl.tensor, column: tl.tensor) -> tl.tensor:
    """h as signed numbers, [rows, columns], of the rows' and the columns' hashes."""
    mixed = (row[:, None] ^ column[None, :]) * tl.full([], _FIRST, tl.uint32)
    mixed = (mixed ^ ((column << 16) | (column >> 16))[None, :]) * tl.full([], _LAST, tl.uint32)
    return mixed.to(tl.int32, bitcast=True)


# Each place has a start, each batch a count of rows of its own: specialised on their values, some would compile the
# kernel again.
@triton.jit(do_not_specialize=["start", "threshold", "count", "x_inner"], do_not_specialize_on_alignment=["keys"])
def keyed_dropout_kernel(
    x: tl.tensor,
    keys: tl.tensor,
    out: tl.tensor,
    start: tl.tensor,
    threshold: tl.tensor,
    factor: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    x_inner: tl.tensor,
    x_outer_stride: tl.tensor,
    x_inner_stride: tl.tensor,
    x_stride: tl.tensor,
    FLAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """out = factor·x where h > threshold, else 0. ``keys`` are int64, or int32 where they are hashed already."""
    # int64 before any stride multiplication: rows times width passes 2³¹.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < count)[:, None] & (columns < width)[None, :]
    key = tl.load(keys + rows, mask=rows < count, other=0)
    column = column_hash(columns, start)
    if keys.dtype.element_ty == tl.int64:
        row = row_hash(key)
    else:
        row = key.to(tl.uint32, bitcast=True)
    source = row_start(x, rows, x_inner, x_outer_stride, x_inner_stride, FLAT)[:, None]
    source += columns.to(tl.int64)[None, :] * x_stride
    values = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    kept = tl.where(element_hash(row, column) > threshold, values * factor, 0.0)
    tl.store(out + rows[:, None] * width + columns[None, :], kept.to(out.dtype.element_ty), mask=inside)


def launch_into(out: Tensor, x: Tensor, keys: Tensor, start: int, threshold: int, factor: float) -> None:
    """Writes ``out``, contiguous and of x's shape, which may be ``x``; ``keys`` int64 [N], or int32 as ``row_hashes``
    gives them.
    """
    count, width = keys.numel(), x.shape[-1]
    if count == 0:
        return
    source, address = addressable(x)
    columns = min(1 << max(width - 1, 0).bit_length(), COLUMNS)
    grid = (triton.cdiv(count, ROWS), triton.cdiv(width, columns))
    with on_device_of(x):
        keyed_dropout_kernel[grid](
            source,
            keys.contiguous(),
            out,
            start,
            threshold,
            factor,
            count,
            width,
            *address,
            FLAT=address.flat,
            ROWS=ROWS,
            COLUMNS=columns,
            num_warps=WARPS,
        )


def launch(x: Tensor, keys: Tensor, start: int, threshold: int, factor: float) -> Tensor:
    """New tensor of x's shape; ``keys`` int64 [N]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_into(out, x, keys, start, threshold, factor)
    return out
