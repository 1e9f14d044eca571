"""Chunks of rows for ops that walk whole [N, width] tensors, each chunk small enough to stay in a core's cache between
its passes.
"""

from collections.abc import Iterator
from itertools import starmap

import torch
from torch import Tensor

from .rows import block_rows, blocks

# Elements of a chunk of rows: per thread of a CPU, so that what is made on the way stays in its core's cache; elsewhere
# few launches and little beside a model.
CPU_CHUNK_ELEMENTS = 1 << 17
DEVICE_CHUNK_ELEMENTS = 1 << 21


def chunk_rows(width: int, device: torch.device) -> int:
    """How many rows of ``width`` elements are worked on at a time on ``device``."""
    return block_rows(width, device, CPU_CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS)


def chunks(rows: Tensor) -> Iterator[slice]:
    """The chunks of ``rows`` [N, width]."""
    count, width = rows.shape
    return starmap(slice, blocks(count, width, rows.device, CPU_CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS))


def one_chunk(rows: Tensor) -> bool:
    """Few rows without a gradient, as generating has them: an op and an autograd function would cost more than their
    work.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return rows.shape[0] <= chunk_rows(rows.shape[1], rows.device)


def chunk_elements(rows: Tensor, device: torch.device) -> int:
    """Elements of the largest chunk of ``rows`` [N, width] on ``device``."""
    return min(chunk_rows(rows.shape[1], device), rows.shape[0]) * rows.shape[1]
