"""Reading and writing rows of [..., D] tensors in small blocks: the torch paths' only scratch memory.

A tensor that cannot be viewed as [N, D] is indexed where it lies, never copied whole.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one scratch block. On a CPU 256 KiB of float32 for each thread, which stay in its cache from one pass to
# the next; on devices where a launch costs more than the work on such a block, 16 MiB.
CPU_ELEMENTS_PER_THREAD = 1 << 16
DEVICE_ELEMENTS = 1 << 22


def count_rows(tensor: Tensor) -> int:
    """N of a [..., D] tensor, also for empty ones."""
    count = 1
    for size in tensor.shape[:-1]:
        count *= size
    return count


def block_rows(
    width: int, device: torch.device, per_thread: int = CPU_ELEMENTS_PER_THREAD, per_device: int = DEVICE_ELEMENTS
) -> int:
    """Rows of one block: ``per_thread`` elements for each thread of a CPU, ``per_device`` elsewhere, and at least one
    row.
    """
    elements = per_thread * torch.get_num_threads() if device.type == "cpu" else per_device
    return max(1, elements // max(width, 1))


def blocks(
    count: int,
    width: int,
    device: torch.device,
    per_thread: int = CPU_ELEMENTS_PER_THREAD,
    per_device: int = DEVICE_ELEMENTS,
) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` over ``count`` rows, in blocks of ``block_rows``."""
    step = block_rows(width, device, per_thread, per_device)
    for start in range(0, count, step):
        yield start, min(start + step, count)


def flat_view(tensor: Tensor) -> Tensor | None:
    """[..., D] as [N, D] without a copy, or None where the strides do not allow it."""
    try:
        return tensor.view(count_rows(tensor), tensor.shape[-1])
    except RuntimeError:
        return None


def copied_bytes(tensor: Tensor | None) -> int:
    """Bytes of the copy that a kernel's launch makes of a tensor whose rows it cannot find by strides."""
    if tensor is None or tensor.dim() <= 3 or flat_view(tensor) is not None:
        return 0
    return tensor.numel() * tensor.element_size()


def _unravelled(index: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """``torch.unravel_index`` without the copies from the host that make it wait for a device."""
    places = []
    for size in reversed(shape):
        places.append(index % size)
        index = index // size
    return tuple(reversed(places))


class RowReader:
    """Blocks of rows of a [..., D] tensor, either all rows in order or those that ``rows`` names."""

    def __init__(self, tensor: Tensor, rows: Tensor | None = None) -> None:
        self.tensor, self.rows, self.flat = tensor, rows, flat_view(tensor)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start … stop-1`` of the selection, [stop-start, D]; a view where nothing has to be gathered."""
        if self.rows is None:
            if self.flat is not None:
                return self.flat[start:stop]
            index = torch.arange(start, stop, device=self.tensor.device)
        else:
            index = self.rows[start:stop]
            if self.flat is not None:
                return self.flat.index_select(0, index)
        return self.tensor[_unravelled(index, self.tensor.shape[:-1])]


def scale_into(out: Tensor, source: Tensor, factor: Tensor, rows: Tensor | None = None) -> Tensor:
    """out = source · factor, contiguous tensors of two dimensions and more, multiplied in ``factor``'s dtype; ``out``
    may be ``source``.

    ``factor`` is a scalar or has one value for each row. With ``rows`` (int64 [R]) row i of ``source`` is added to row
    ``rows[i]`` of ``out``, which holds zeros: an index that comes twice gets both.
    A plain product of a 16-bit tensor and a scalar rounds the scalar to 16 bits on some devices.
    """
    if source.numel() == 0:
        return out
    flat_out, flat = out.view(-1, out.shape[-1]), source.view(-1, source.shape[-1])
    for start, stop in blocks(flat.shape[0], flat.shape[1], source.device):
        part = factor[start:stop] if factor.dim() else factor
        if rows is None:
            torch.mul(flat[start:stop].to(factor.dtype), part, out=flat_out[start:stop])
        else:
            flat_out.index_add_(0, rows[start:stop], (flat[start:stop].to(factor.dtype) * part).to(out.dtype))
    return out


def gather(tensor: Tensor, rows: Tensor) -> Tensor:
    """New tensor [R, D] of the rows of a [..., D] tensor."""
    return RowReader(tensor, rows).read(0, rows.shape[0])
