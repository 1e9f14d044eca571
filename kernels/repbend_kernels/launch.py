"""What the Triton launchers share: the size rule for launch parameters, row addressing, the device of a launch.

Launch parameters follow from sizes alone, never from timing, so that a training step meets no surprise:

    block  = the row's width up to the next power of two, at most ``limit``; a wider row is walked in blocks
    warps  = block / 512, between 1 and 16: each thread then holds 16 elements, two 16-byte loads of a 16-bit row

One program owns a row, and no row is shared between programs where a sum is taken, so every sum has one order.

Legend: N rows, T rows that lie one stride apart, D width.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import flat_view

_NOTHING = nullcontext()


class Launch(NamedTuple):
    """Block width and warps of one program."""

    block: int
    warps: int


def size_rule(width: int, limit: int) -> Launch:
    """Launch parameters for rows of ``width`` elements; see the module's rule."""
    block = min(1 << max(width - 1, 0).bit_length(), limit)
    return Launch(block, min(max(block // 512, 1), 16))


class RowAddress(NamedTuple):
    """Row i of a [..., D] tensor starts at ``(i // inner)·outer_stride + (i % inner)·inner_stride``; at
    ``i · inner_stride`` where ``inner`` is 0.
    """

    inner: int
    outer_stride: int
    inner_stride: int
    element_stride: int

    @property
    def flat(self) -> bool:
        """Whether all rows lie one stride apart: kernels then divide no row number."""
        return self.inner == 0


def addressable(tensor: Tensor) -> tuple[Tensor, RowAddress]:
    """The tensor and how its rows are found. Only a tensor of more than three dimensions with odd strides is copied."""
    flat = flat_view(tensor)
    if flat is None and tensor.dim() != 3:
        tensor = tensor.contiguous()
        flat = flat_view(tensor)
    if flat is not None:
        return flat, RowAddress(0, 0, flat.stride(0), flat.stride(1))
    return tensor, RowAddress(tensor.shape[1], *tensor.stride())


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one; nothing on the CPU, where kernels are interpreted."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)
