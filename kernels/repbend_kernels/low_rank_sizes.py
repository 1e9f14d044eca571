"""How the kernels of ``lora_down`` and ``lora_up`` cut their work, from sizes alone, and the room that the parts of
their sums take.

A tile's columns follow from the rank, so that what a program accumulates stays in registers. A backward program owns
such a tile over a slab of rows; slabs are as many as fill the device, since each leaves a part of dA or dB to add up.

Legend: N rows, W columns (D or O), r rank.
"""

from typing import NamedTuple

import torch

WARPS = 4
# About as many as GPUs have multiprocessors: fewer programs leave some idle, more write more parts.
PROGRAMS = 128
# Rows of a tile that is walked down: the least that a matrix product takes, so that a tile of columns can be wide.
ROWS = 16
# lora_up's tile, and the ranks of one of its products.
UP_ROWS, UP_COLUMNS, UP_RANK = 64, 64, 16
SUM_BLOCK = 512
# Columns of a span of lora_down, and tiles of rows in a slab, at least.
LEAST_SPAN, LEAST_TILES = 512, 4
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


def tiles(rank: int, width: int, rows: torch.dtype, weight: torch.dtype) -> Tiles:
    """For ``width`` columns of ``rows`` that meet a ``weight``. Products in tf32 hold twice the registers of narrow
    ones, of operands twice as large.
    """
    block, widest = _power_of_two(rank), _power_of_two(width)
    narrow = rows == torch.bfloat16 or (rows == weight and rows.itemsize == 2)
    share = 1 if narrow else 2 if rows.itemsize == 2 else 4
    walked, owned = (min(max(elements // share // block, 16), widest) for elements in (2048, 4096))
    return Tiles(block, walked, min(owned, 128), owned)


def down_rows(count: int, block: int) -> int:
    """Rows of a program of ``lora_down``: more where A is large, which each of them reads, or where there are many."""
    return max(16, min(block // 2, 64)) * (1 if count < 32 * PROGRAMS else 2)


def span_steps(count: int, width: int, rows: int, walked: int) -> int:
    """Tiles of columns in a span of ``lora_down``: the whole row, unless there are too few rows to fill the device."""
    row_tiles, steps = blocks(count, rows), blocks(width, walked)
    if row_tiles >= PROGRAMS // 4:
        return steps
    return blocks(steps, min(blocks(PROGRAMS, row_tiles), blocks(width, LEAST_SPAN)))


def slab_steps(count: int, width: int, owned: int) -> int:
    """Tiles of rows in a backward program's slab."""
    slabs = max(1, PROGRAMS // blocks(width, owned))
    return max(blocks(blocks(count, slabs), ROWS), LEAST_TILES)


def part_stride(size: int) -> int:
    """Elements from part to part, of ``size`` used ones."""
    return blocks(size, ALIGNMENT) * ALIGNMENT


def parts_bytes(count: int, width: int, rank: int, rows: torch.dtype, weight: torch.dtype) -> int:
    """Bytes of the parts of Q and dB, of dA, or of P, whichever are most."""
    if not count or not width or not rank:
        return 0
    sizes = tiles(rank, width, rows, weight)
    per_row, per_column = part_stride(count * rank), part_stride(width * rank)
    slabs = [blocks(count, slab_steps(count, width, owned) * ROWS) for owned in (sizes.up, sizes.down)]
    tile_rows = down_rows(count, sizes.rank)
    spans = blocks(width, span_steps(count, width, tile_rows, sizes.walked) * sizes.walked)
    sums = (blocks(width, sizes.up) * per_row + slabs[0] * per_column, slabs[1] * per_column, spans * per_row)
    return 4 * max(sums)
