"""Triton kernels of ``lora_up``, forward and backward, which walk the wide tensors once, and what all of LoRA's kernels
share: products to float32's accuracy, and sums of parts.

    lora_up_kernel               y += f · P Bᵀ in place
    lora_up_backward_kernel      G B and Gᵀ P of one reading of G, both in parts
    sum_parts_kernel             adds parts in the order in which they lie

A program of a backward kernel owns a tile of columns and a slab of rows. What it adds up over its columns (Q) or over
its rows (dB) is one part of the sum, so nothing is added atomically and results repeat to the bit. Launches are in
``low_rank_launch``, sizes of tiles and slabs in ``low_rank_sizes``, ``lora_down``'s kernels in ``low_rank_down``.

Legend: N rows, W columns (O), r rank, R the rank's block (r up to a power of two, at least 16).
"""

import os

import triton
import triton.language as tl

__all__ = ["lora_up_backward_kernel", "lora_up_kernel", "product", "sum_parts_kernel"]

# Triton's interpreter multiplies bfloat16 by its bits; widened, the products are the same.
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def narrow_product(left: tl.tensor, right: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total + left · right of operands in one 16-bit dtype; their products are exact."""
    if WIDEN:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left, right, total)


@triton.jit
def cut(wide: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The upper half of float32's bits, as bfloat16, and what it leaves. By integers: rounding is converted element by
    element, at a quarter of their rate.
    """
    upper = wide.to(tl.uint32, bitcast=True) & 0xFFFF0000
    half = (upper >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return half, wide - upper.to(tl.float32, bitcast=True)


@triton.jit
def product(left: tl.tensor, right: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total + left · right, to float32's accuracy whatever the operands' dtypes are.

    Beside bfloat16 a wide operand is the sum of three bfloat16 parts, all its 24 bits; three such products cost half of
    what three in tf32 do. float16's range would lose small parts: it goes the way of float32.
    """
    NARROW_LEFT: tl.constexpr = left.dtype == tl.bfloat16
    NARROW_RIGHT: tl.constexpr = right.dtype == tl.bfloat16
    if left.dtype == right.dtype and left.dtype != tl.float32:
        total = narrow_product(left, right, total)
    elif NARROW_LEFT or NARROW_RIGHT:
        high, rest = cut((right if NARROW_LEFT else left).to(tl.float32))
        middle, rest = cut(rest)
        low, _ = cut(rest)
        if NARROW_LEFT:
            total = narrow_product(left, low, total)
            total = narrow_product(left, middle, total)
            total = narrow_product(left, high, total)
        else:
            total = narrow_product(low, right, total)
            total = narrow_product(middle, right, total)
            total = narrow_product(high, right, total)
    else:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="tf32x3")
    return total


@triton.jit(do_not_specialize=["count"])
def lora_up_kernel(
    result: tl.tensor,
    down: tl.tensor,
    b: tl.tensor,
    factor: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    y_row: tl.tensor,
    y_column: tl.tensor,
    p_row: tl.tensor,
    p_column: tl.tensor,
    b_row: tl.tensor,
    b_column: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """result += factor · P Bᵀ, rounded once."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    known, inside = rows < count, columns < width
    added = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in tl.range(0, rank, RANK, num_stages=1):
        ranks = (first + tl.arange(0, RANK)).to(tl.int64)
        used = (ranks < rank)[None, :]
        p = tl.load(down + rows[:, None] * p_row + ranks[None, :] * p_column, mask=known[:, None] & used, other=0.0)
        w = tl.load(b + columns[:, None] * b_row + ranks[None, :] * b_column, mask=inside[:, None] & used, other=0.0)
        added = product(p, tl.trans(w), added)
    place = result + rows[:, None] * y_row + columns[None, :] * y_column
    inside = known[:, None] & inside[None, :]
    y = tl.load(place, mask=inside, other=0.0).to(tl.float32) + factor * added
    tl.store(place, y.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "steps"])
def lora_up_backward_kernel(
    grad: tl.tensor,
    down: tl.tensor,
    b: tl.tensor,
    up: tl.tensor,
    grad_b: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    steps: tl.tensor,
    up_part: tl.tensor,
    b_part: tl.tensor,
    g_row: tl.tensor,
    g_column: tl.tensor,
    p_row: tl.tensor,
    p_column: tl.tensor,
    b_row: tl.tensor,
    b_column: tl.tensor,
    HAS_UP: tl.constexpr,
    HAS_B: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """up[t] = G B over the columns of tile t, grad_b[s] = Gᵀ P over the rows of slab s."""
    tile, slab = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK).to(tl.int64)
    inside, used = columns < width, ranks < rank
    held = inside[:, None] & used[None, :]
    if HAS_UP:
        w = tl.load(b + columns[:, None] * b_row + ranks[None, :] * b_column, mask=held, other=0.0)
    total = tl.zeros([COLUMNS, RANK], dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=2):
        rows = (slab * steps + step) * ROWS + tl.arange(0, ROWS)
        known = rows < count
        g = tl.load(
            grad + rows[:, None] * g_row + columns[None, :] * g_column, mask=known[:, None] & inside[None, :], other=0.0
        )
        some = known[:, None] & used[None, :]
        if HAS_UP:
            q = product(g, w, tl.zeros([ROWS, RANK], dtype=tl.float32))
            tl.store(up + tile * up_part + rows[:, None] * rank + ranks[None, :], q, mask=some)
        if HAS_B:
            p = tl.load(down + rows[:, None] * p_row + ranks[None, :] * p_column, mask=some, other=0.0)
            total = product(tl.trans(g), p, total)
    if HAS_B:
        tl.store(grad_b + slab * b_part + columns[:, None] * rank + ranks[None, :], total, mask=held)


@triton.jit
def sum_into(
    parts: tl.tensor,
    out: tl.tensor,
    block: tl.tensor,
    count: tl.tensor,
    part: tl.tensor,
    size: tl.tensor,
    factor: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One block of out = factor · Σ of ``count`` parts, first to last."""
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    place = parts + offsets
    for _ in tl.range(0, count, loop_unroll_factor=4):
        # Up to the part's end, which is aligned as its size need not be: 16 bytes at a time.
        total += tl.load(place, mask=offsets < part, other=0.0)
        place += part
    tl.store(out + offsets, (total * factor).to(out.dtype.element_ty), mask=offsets < size)


@triton.jit(do_not_specialize=["count_one", "count_two", "size_one", "size_two"])
def sum_parts_kernel(
    parts_one: tl.tensor,
    out_one: tl.tensor,
    count_one: tl.tensor,
    part_one: tl.tensor,
    size_one: tl.tensor,
    parts_two: tl.tensor,
    out_two: tl.tensor,
    count_two: tl.tensor,
    part_two: tl.tensor,
    size_two: tl.tensor,
    factor: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Two sums of parts in one launch; the second has size 0 where there is one."""
    block, first = tl.program_id(0), tl.cdiv(size_one, BLOCK)
    if block < first:
        sum_into(parts_one, out_one, block, count_one, part_one, size_one, factor, BLOCK)
    else:
        sum_into(parts_two, out_two, block - first, count_two, part_two, size_two, factor, BLOCK)
