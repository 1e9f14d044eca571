"""Triton kernels of ``lora_down``, forward and backward: x is read once and masked in registers, for one layer or for
two or three that read it.

    lora_down_kernel             P = (keep · x) [A_1; A_2; A_3]ᵀ
    lora_down_backward_kernel    dx += keep · (Q A) in place, and Qᵀ (keep · x) in parts

The A of several layers count as one matrix, one below the other, without being copied there, as do their Q beside each
other: a program finds each rank's row in its own matrix. A program of the backward kernel owns a tile of columns and a
slab of rows; what it adds up over its rows is one part of dA (``low_rank`` adds them).

Legend: N rows, W columns (D), r ranks of all layers, R the ranks' block (r up to a power of two, at least 16).
"""

import triton
import triton.language as tl

from .keyed_dropout import column_hash, element_hash
from .low_rank import product

__all__ = ["PRODUCT_RANK", "lora_down_backward_kernel", "lora_down_kernel"]

# The most ranks of which a program of lora_down's backward holds a tile of A; of more it reads them again for each tile
# of rows.
PRODUCT_RANK = tl.constexpr(32)


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


@triton.jit
def rows_of(
    ranks: tl.tensor,
    one: tl.tensor,
    two: tl.tensor,
    three: tl.tensor,
    end_one: tl.tensor,
    end_two: tl.tensor,
    stride: tl.tensor,
    SHARED: tl.constexpr,
) -> tl.tensor:
    """Where the ranks' rows begin in ``SHARED`` matrices that count as one below the other; ``one`` ends before rank
    ``end_one``, ``two`` before ``end_two``. Pointers [ranks].
    """
    base, within = one, ranks
    if SHARED > 1:
        base = tl.where(ranks < end_one, one, two)
        within = tl.where(ranks < end_one, ranks, ranks - end_one)
    if SHARED > 2:
        base = tl.where(ranks < end_two, base, three)
        within = tl.where(ranks < end_two, within, ranks - end_two)
    return base + within * stride


@triton.jit
def up_at(
    rows: tl.tensor,
    ranks: tl.tensor,
    one: tl.tensor,
    two: tl.tensor,
    three: tl.tensor,
    rank: tl.tensor,
    end_one: tl.tensor,
    end_two: tl.tensor,
    SHARED: tl.constexpr,
) -> tl.tensor:
    """Where the elements of Q lie in ``SHARED`` matrices that count as one beside the other, each [N, its ranks].
    Pointers [rows, ranks].
    """
    length = rank
    if SHARED > 1:
        length = tl.where(ranks < end_one, end_one, end_two - end_one)[None, :]
    if SHARED > 2:
        length = tl.where((ranks < end_two)[None, :], length, rank - end_two)
    return rows_of(ranks, one, two, three, end_one, end_two, 1, SHARED)[None, :] + rows[:, None] * length


@triton.jit
def add_at(place: tl.tensor, added: tl.tensor, some: tl.tensor) -> None:
    """What lies at ``place`` += ``added``, rounded once."""
    value = tl.load(place, mask=some, other=0.0).to(tl.float32) + added
    tl.store(place, value.to(place.dtype.element_ty), mask=some)


# fmt: off
@triton.jit(do_not_specialize=["start", "threshold", "count", "steps"], do_not_specialize_on_alignment=["hashes"])
def lora_down_kernel(
    x: tl.tensor, a_one: tl.tensor, a_two: tl.tensor, a_three: tl.tensor, hashes: tl.tensor, down: tl.tensor,
    start: tl.tensor, threshold: tl.tensor, count: tl.tensor, width: tl.tensor, rank: tl.tensor, end_one: tl.tensor,
    end_two: tl.tensor, steps: tl.tensor, part: tl.tensor, x_row: tl.tensor, x_column: tl.tensor, a_row: tl.tensor,
    a_column: tl.tensor, SHARED: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """down[s] = (keep · x) Aᵀ over the columns of span s; A is ``SHARED`` matrices."""
    # int64 before any stride multiplication: rows times width passes 2³¹.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = rows < count
    ranks = tl.arange(0, RANK).to(tl.int64)
    a_rows = rows_of(ranks, a_one, a_two, a_three, end_one, end_two, a_row, SHARED)
    total = tl.zeros([ROWS, RANK], dtype=tl.float32)
    DEPTH: tl.constexpr = 3 if RANK <= 64 else 2
    for step in tl.range(0, steps, num_stages=DEPTH):
        columns = (tl.program_id(1) * steps + step) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < width
        wide = columns.to(tl.int64)
        some = known[:, None] & inside[None, :]
        m = tl.load(x + rows[:, None] * x_row + wide[None, :] * x_column, mask=some, other=0.0)
        if HAS_MASK:
            m = tl.where(kept(hashes, rows, known, columns, start, threshold), m, 0.0)
        held = (ranks < rank)[:, None] & inside[None, :]
        w = tl.load(a_rows[:, None] + wide[None, :] * a_column, mask=held, other=0.0)
        total = product(m, tl.trans(w), total)
    place = down + tl.program_id(1).to(tl.int64) * part + rows[:, None] * rank + ranks[None, :]
    tl.store(place, total, mask=known[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["start", "threshold", "count", "steps"], do_not_specialize_on_alignment=["hashes"])
def lora_down_backward_kernel(
    grad_x: tl.tensor, x: tl.tensor, a_one: tl.tensor, a_two: tl.tensor, a_three: tl.tensor, up_one: tl.tensor,
    up_two: tl.tensor, up_three: tl.tensor, hashes: tl.tensor, grad_a: tl.tensor, start: tl.tensor,
    threshold: tl.tensor, count: tl.tensor, width: tl.tensor, rank: tl.tensor, end_one: tl.tensor, end_two: tl.tensor,
    steps: tl.tensor, part: tl.tensor, g_row: tl.tensor, g_column: tl.tensor, x_row: tl.tensor, x_column: tl.tensor,
    a_row: tl.tensor, a_column: tl.tensor, SHARED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_X: tl.constexpr,
    HAS_A: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
) -> None:
    """grad_x += keep · (Q A) in place, rounded once; grad_a[s] = Qᵀ (keep · x) over the rows of slab s. A and Q are
    ``SHARED`` matrices.
    """
    slab = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wide, ranks = columns.to(tl.int64), tl.arange(0, RANK).to(tl.int64)
    inside, used = columns < width, ranks < rank
    held = used[:, None] & inside[None, :]
    if HAS_X and RANK <= PRODUCT_RANK:
        a_rows = rows_of(ranks, a_one, a_two, a_three, end_one, end_two, a_row, SHARED)
        w = tl.load(a_rows[:, None] + wide[None, :] * a_column, mask=held, other=0.0)
    total = tl.zeros([RANK, COLUMNS], dtype=tl.float32)
    for step in tl.range(0, steps, num_stages=2):
        rows = (slab * steps + step) * ROWS + tl.arange(0, ROWS)
        known = rows < count
        some = known[:, None] & inside[None, :]
        q_at = up_at(rows, ranks, up_one, up_two, up_three, rank, end_one, end_two, SHARED)
        q = tl.load(q_at, mask=known[:, None] & used[None, :], other=0.0)
        keep = some
        if HAS_MASK:
            keep = kept(hashes, rows, known, columns, start, threshold)
        if HAS_X:
            added = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            if RANK <= PRODUCT_RANK:
                added = product(q, w, added)
            else:
                for first in tl.range(0, rank, PRODUCT_RANK, num_stages=1):
                    few = first + tl.arange(0, PRODUCT_RANK).to(tl.int64)
                    some_q, some_w = known[:, None] & (few < rank)[None, :], (few < rank)[:, None] & inside[None, :]
                    few_at = up_at(rows, few, up_one, up_two, up_three, rank, end_one, end_two, SHARED)
                    a_rows = rows_of(few, a_one, a_two, a_three, end_one, end_two, a_row, SHARED)
                    q_few = tl.load(few_at, mask=some_q, other=0.0)
                    w_few = tl.load(a_rows[:, None] + wide[None, :] * a_column, mask=some_w, other=0.0)
                    added = product(q_few, w_few, added)
            add_at(grad_x + rows[:, None] * g_row + wide[None, :] * g_column, tl.where(keep, added, 0.0), some)
        if HAS_A:
            m = tl.load(x + rows[:, None] * x_row + wide[None, :] * x_column, mask=some, other=0.0)
            total = product(tl.trans(q), tl.where(keep, m, 0.0), total)
    if HAS_A:
        tl.store(grad_a + slab * part + ranks[:, None] * width + wide[None, :], total, mask=held)
# fmt: on
