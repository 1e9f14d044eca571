"""How the kernels of ``lora_down`` and ``lora_up`` cut their work, from sizes alone, and the room that the parts of
their sums take.

A tile's columns follow from the rank, so that what a program accumulates stays in registers. A backward program owns
such a tile over a slab of rows; slabs are as many as fill the device, since each leaves a part of dA or dB to add up.

Legend: N rows, W columns (D or O), r rank.
"""

from functools import cache
from typing import NamedTuple

import torch

__all__ = [
    "DOWN_BACK_ROWS",
    "MOST_SHARED",
    "MOST_SHARED_RANK",
    "SUM_BLOCK",
    "UP_COLUMNS",
    "UP_RANK",
    "UP_ROWS",
    "WARPS",
    "down_rows",
    "tiles",
    "up_back_rows",
]

WARPS = 4
# About as many as GPUs have multiprocessors: fewer programs leave some idle, more write more parts.
PROGRAMS = 128
# Rows of a tile that is walked down, of lora_down's and lora_up's backward: few, so that a tile of columns can be wide.
DOWN_BACK_ROWS = 16
# lora_up's tile, and the ranks of one of its products.
UP_ROWS, UP_COLUMNS, UP_RANK = 64, 64, 16
SUM_BLOCK = 512
# Matrices that one launch takes for one x, and the ranks of them together for which its kernels compile without spills.
MOST_SHARED, MOST_SHARED_RANK = 3, 128
# Columns of a span of lora_down, and rows of a slab, at least.
LEAST_SPAN, LEAST_SLAB = 512, 64
# Parts begin at multiples of so many elements, whatever the sizes are, so that they are read 16 bytes at a time.
ALIGNMENT = 16


class Tiles(NamedTuple):
    """The rank's block, and columns of a tile: of ``lora_down``'s walk, of a program of its backward, and of one of
    ``lora_up``'s backward.
    """

    rank: int
    walked: int
    down: int
    up: int


def blocks(size: int, block: int) -> int:
    """How many blocks ``size`` takes."""
    return -(-size // block)


def _power_of_two(size: int) -> int:
    """``size`` up to a power of two, at least 16, which is the least side of a matrix product."""
    return max(16, 1 << max(size - 1, 0).bit_length())


@cache
def tiles(rank: int, width: int, rows: torch.dtype, weight: torch.dtype) -> Tiles:
    """For ``width`` columns of ``rows`` that meet a ``weight``. Products in tf32 hold twice the registers of narrow
    ones, of operands twice as large.
    """
    block, widest = _power_of_two(rank), _power_of_two(width)
    narrow = rows == torch.bfloat16 or (rows == weight and rows.itemsize == 2)
    share = 1 if narrow else 2 if rows.itemsize == 2 else 4
    walked, owned = (min(max(elements // share // block, 16), widest) for elements in (1024, 4096))
    # Of 64 ranks, as three layers of rank 16 have them, 32 columns spill beside float16 (sm_80), twice as many do not.
    least = 64 if block == 64 and rows.itemsize == 2 else 16
    return Tiles(block, walked, max(min(owned, 128), least), owned)


def up_back_rows(block: int) -> int:
    """Of ``lora_up``'s backward: where a product's result is rows times ranks, warps without rows of their own repeat
    others' work; a high rank leaves no registers for more rows.
    """
    return 32 if block <= 64 else 16


def down_rows(count: int) -> int:
    """Rows of a program of ``lora_down``, 16 a warp: each program reads all of A and takes its parts."""
    return min(_power_of_two(count), 16 * WARPS)


def span_steps(count: int, width: int, rows: int, walked: int) -> int:
    """Tiles of columns in a span of ``lora_down``: the whole row, unless there are too few rows to fill the device."""
    row_tiles, steps = blocks(count, rows), blocks(width, walked)
    if row_tiles >= PROGRAMS // 2:
        return steps
    return blocks(steps, min(blocks(PROGRAMS, row_tiles), blocks(width, LEAST_SPAN)))


def slab_steps(count: int, width: int, rows: int, owned: int) -> int:
    """Tiles of rows in a backward program's slab."""
    slabs = max(1, PROGRAMS // blocks(width, owned))
    return max(blocks(blocks(count, slabs), rows), blocks(LEAST_SLAB, rows))


def part_stride(size: int) -> int:
    """Elements from part to part, of ``size`` used ones."""
    return blocks(size, ALIGNMENT) * ALIGNMENT


def parts_bytes(count: int, width: int, rank: int, dtype: torch.dtype, weight: torch.dtype) -> int:
    """Bytes of the parts of Q and dB, of dA, or of P, whichever are most."""
    if not count or not width or not rank:
        return 0
    sizes = tiles(rank, width, dtype, weight)
    per_row, per_column = part_stride(count * rank), part_stride(width * rank)
    owned = ((up_back_rows(sizes.rank), sizes.up), (DOWN_BACK_ROWS, sizes.down))
    slabs = [blocks(count, slab_steps(count, width, rows, columns) * rows) for rows, columns in owned]
    tile_rows = down_rows(count)
    spans = blocks(width, span_steps(count, width, tile_rows, sizes.walked) * sizes.walked)
    sums = (blocks(width, sizes.up) * per_row + slabs[0] * per_column, slabs[1] * per_column, spans * per_row)
    return 4 * max(sums)
