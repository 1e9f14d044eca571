"""Triton kernels of ``lora_down`` and ``lora_up``, forward and backward: each walks the wide tensors once and draws the
mask in registers.

    lora_down_kernel             P = (keep · x) Aᵀ
    lora_up_kernel               y += f · P Bᵀ in place
    lora_up_backward_kernel      G B and Gᵀ P of one reading of G, both in parts
    lora_down_backward_kernel    dx += keep · (Q A) in place, and Qᵀ (keep · x) in parts
    sum_parts_kernel             adds parts in the order in which they lie

A program of a backward kernel owns a tile of columns and a slab of rows. What it adds up over its columns (Q) or over
its rows (dA, dB) is one part of the sum, so nothing is added atomically and results repeat to the bit. Launches are in
``low_rank_launch``, sizes of tiles and slabs in ``low_rank_sizes``.

Legend: N rows, W columns (D or O), r rank, R the rank's block (r up to a power of two, at least 16).
"""

import os

import triton
import triton.language as tl

from .keyed_dropout import column_hash, element_hash

__all__ = [
    "PRODUCT_RANK",
    "lora_down_backward_kernel",
    "lora_down_kernel",
    "lora_up_backward_kernel",
    "lora_up_kernel",
    "sum_parts_kernel",
]

# The most ranks of which a program of lora_down's backward holds a tile of A; of more it reads them again for each tile
# of rows.
PRODUCT_RANK = tl.constexpr(32)
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


@triton.jit
def kept(
    hashes: tl.tensor,
    rows: tl.tensor,
    known: tl.tensor,
    columns: tl.tensor,
    start: tl.tensor,
    threshold: tl.tensor,
) -> tl.tensor:
    """Which elements dropout keeps, [rows, columns]."""
    row = tl.load(hashes + rows, mask=known, other=0).to(tl.uint32, bitcast=True)
    return element_hash(row, column_hash(columns, start)) > threshold


@triton.jit(do_not_specialize=["start", "threshold", "count", "steps"], do_not_specialize_on_alignment=["hashes"])
def lora_down_kernel(
    x: tl.tensor,
    a: tl.tensor,
    hashes: tl.tensor,
    down: tl.tensor,
    start: tl.tensor,
    threshold: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    steps: tl.tensor,
    part: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    a_row: tl.tensor,
    a_column: tl.tensor,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """down[s] = (keep · x) Aᵀ over the columns of span s."""
    # int64 before any stride multiplication: rows times width passes 2³¹.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = rows < count
    ranks = tl.arange(0, RANK)
    total = tl.zeros([ROWS, RANK], dtype=tl.float32)
    DEPTH: tl.constexpr = 3 if RANK <= 64 else 2
    for step in tl.range(0, steps, num_stages=DEPTH):
        columns = (tl.program_id(1) * steps + step) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < width
        wide = columns.to(tl.int64)
        m = tl.load(
            x + rows[:, None] * x_row + wide[None, :] * x_column, mask=known[:, None] & inside[None, :], other=0.0
        )
        if HAS_MASK:
            m = tl.where(kept(hashes, rows, known, columns, start, threshold), m, 0.0)
        w = tl.load(
            a + ranks.to(tl.int64)[:, None] * a_row + wide[None, :] * a_column,
            mask=(ranks < rank)[:, None] & inside[None, :],
            other=0.0,
        )
        total = product(m, tl.trans(w), total)
    place = down + tl.program_id(1).to(tl.int64) * part + rows[:, None] * rank + ranks[None, :]
    tl.store(place, total, mask=known[:, None] & (ranks < rank)[None, :])


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
def product_in_turn(
    left: tl.tensor,
    right: tl.tensor,
    known: tl.tensor,
    inside: tl.tensor,
    rank: tl.tensor,
    right_row: tl.tensor,
    total: tl.tensor,
) -> tl.tensor:
    """total + left · right, a few ranks at a time; ``left`` points at its rows, ``right`` at its columns."""
    for first in tl.range(0, rank, PRODUCT_RANK, num_stages=1):
        few = first + tl.arange(0, PRODUCT_RANK).to(tl.int64)
        used = few < rank
        q = tl.load(left + few[None, :], mask=known & used[None, :], other=0.0)
        w = tl.load(right + few[:, None] * right_row, mask=used[:, None] & inside, other=0.0)
        total = product(q, w, total)
    return total


@triton.jit
def add_at(place: tl.tensor, added: tl.tensor, some: tl.tensor) -> None:
    """What lies at ``place`` += ``added``, rounded once."""
    value = tl.load(place, mask=some, other=0.0).to(tl.float32) + added
    tl.store(place, value.to(place.dtype.element_ty), mask=some)


@triton.jit(do_not_specialize=["start", "threshold", "count", "steps"], do_not_specialize_on_alignment=["hashes"])
def lora_down_backward_kernel(
    grad_x: tl.tensor,
    x: tl.tensor,
    a: tl.tensor,
    up: tl.tensor,
    hashes: tl.tensor,
    grad_a: tl.tensor,
    start: tl.tensor,
    threshold: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    rank: tl.tensor,
    steps: tl.tensor,
    part: tl.tensor,
    g_row: tl.tensor,
    g_column: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    a_row: tl.tensor,
    a_column: tl.tensor,
    HAS_MASK: tl.constexpr,
    HAS_X: tl.constexpr,
    HAS_A: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """grad_x += keep · (Q A) in place, rounded once; grad_a[s] = Qᵀ (keep · x) over the rows of slab s."""
    slab = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wide, ranks = columns.to(tl.int64), tl.arange(0, RANK).to(tl.int64)
    inside, used = columns < width, ranks < rank
    held = used[:, None] & inside[None, :]
    if HAS_X and RANK <= PRODUCT_RANK:
        w = tl.load(a + ranks[:, None] * a_row + wide[None, :] * a_column, mask=held, other=0.0)
    total = tl.zeros([RANK, COLUMNS], dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=2):
        rows = (slab * steps + step) * ROWS + tl.arange(0, ROWS)
        known = rows < count
        some = known[:, None] & inside[None, :]
        q = tl.load(up + rows[:, None] * rank + ranks[None, :], mask=known[:, None] & used[None, :], other=0.0)
        keep = some
        if HAS_MASK:
            keep = kept(hashes, rows, known, columns, start, threshold)
        if HAS_X:
            added = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            if RANK <= PRODUCT_RANK:
                added = product(q, w, added)
            else:
                q_rows, w_columns = up + rows[:, None] * rank, a + wide[None, :] * a_column
                added = product_in_turn(q_rows, w_columns, known[:, None], inside[None, :], rank, a_row, added)
            add_at(grad_x + rows[:, None] * g_row + wide[None, :] * g_column, tl.where(keep, added, 0.0), some)
        if HAS_A:
            m = tl.load(x + rows[:, None] * x_row + wide[None, :] * x_column, mask=some, other=0.0)
            total = product(tl.trans(q), tl.where(keep, m, 0.0), total)
    if HAS_A:
        tl.store(grad_a + slab * part + ranks[:, None] * width + wide[None, :], total, mask=held)


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
