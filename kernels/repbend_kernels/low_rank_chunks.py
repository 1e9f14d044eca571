"""The plain-torch path of ``lora_down`` and ``lora_up``: chunks of rows, so that nothing masked or widened ever has
x's size.

16-bit rows are widened for products with 32-bit adapter weights, chunk by chunk; rows in the accumulating dtype need no
chunks where no mask is drawn.

Legend: N rows (tokens), D inputs, O outputs, r rank, n rows of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import accumulate_dtype
from .keyed_dropout import CPU_ELEMENTS_PER_THREAD as HASHES_PER_THREAD
from .keyed_dropout import KeyedMask
from .selection import implementation as use_implementation

# Elements of a chunk of rows. On a CPU smaller ones, which stay in a core's cache, are no faster (docs/log.md). A
# matrix product of fewer rows than the least would read the adapter's weights too often.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 22}
LEAST_ROWS = 64


def _chunk_rows(width: int, device: torch.device) -> int:
    return max(LEAST_ROWS, CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "other"] // width)


def _chunks(rows: Tensor) -> Iterator[tuple[int, int]]:
    count, width = rows.shape
    step = _chunk_rows(width, rows.device)
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _chunks_of_narrow(rows: Tensor, acc: torch.dtype) -> Iterator[tuple[int, int]]:
    """Chunks of 16-bit ``rows`` [N, width], which are widened; others all at once."""
    return iter([(0, rows.shape[0])]) if rows.dtype == acc else _chunks(rows)


def _product(left: Tensor, right: Tensor, acc: torch.dtype) -> Tensor:
    """left [n, k] · right [k, m] → [n, m] in ``acc``."""
    return left.to(acc) @ right.to(acc)


def _add_product_(out: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """out [n, m] += factor · left [n, r] · right [r, m], rounded once to ``out``'s dtype; ``left`` has the accumulating
    dtype.
    """
    if out.dtype == left.dtype:
        out.addmm_(left, right.to(left.dtype), alpha=factor)
    else:
        out.copy_(torch.addmm(out.to(left.dtype), left, right.to(left.dtype), alpha=factor))


class _MaskedRows:
    """What dropout leaves of chunks of rows of x, and the same mask on what goes back to them; a buffer serves every
    chunk.
    """

    def __init__(self, x: Tensor, hashes: Tensor | None, place: int, p: float) -> None:
        with use_implementation("torch"):
            self.mask = None if hashes is None else KeyedMask(hashes, place, p, x.shape[1], x.dtype, hashed=True)
        self.x, self.buffer = x, x.new_empty((0, x.shape[1]))

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The chunks of x's rows: all of them at once where there is nothing to make of them."""
        return _chunks(self.x) if self.mask is not None else _chunks_of_narrow(self.x, accumulate_dtype(self.x.dtype))

    def read(self, start: int, stop: int, inner: Tensor | None = None) -> Tensor:
        """Rows of x, masked; the next call overwrites them. ``inner``, of the same rows, is masked in place."""
        rows = self.x[start:stop]
        if self.mask is None:
            return rows
        if self.buffer.shape[0] < stop - start:
            self.buffer = self.x.new_empty((stop - start, self.x.shape[1]))
        kept = self.buffer[: stop - start]
        self.mask.apply(
            [rows] if inner is None else [rows, inner], [kept] if inner is None else [kept, inner], start, stop
        )
        return kept

    def add_gradient_(
        self, grad_rows: Tensor, start: int, stop: int, up: Tensor, a: Tensor, *, read: bool
    ) -> Tensor | None:
        """``grad_rows`` += keep · (Q A), Q being ``up``, rounded once; with ``read`` the rows of x, masked."""
        if self.mask is None:
            _add_product_(grad_rows, up, a, 1.0)
            return self.read(start, stop) if read else None
        inner = up @ a.to(up.dtype)
        kept = None
        if read:
            kept = self.read(start, stop, inner)
        else:
            self.mask.apply([inner], [inner], start, stop)
        grad_rows.add_(inner)
        return kept


def down_product(x: Tensor, a: Tensor, hashes: Tensor | None, place: int, p: float) -> Tensor:
    """P = (keep · x) Aᵀ, [N, r]."""
    acc = accumulate_dtype(x.dtype)
    down = x.new_empty((x.shape[0], a.shape[0]), dtype=acc)
    rows = _MaskedRows(x, hashes, place, p)
    for start, stop in rows.chunks():
        down[start:stop] = _product(rows.read(start, stop), a.T, acc)
    return down


def add_up_(result: Tensor, down: Tensor, b: Tensor, factor: float) -> None:
    """``result`` [N, O] += f · P Bᵀ in place."""
    for start, stop in _chunks_of_narrow(result, down.dtype):
        _add_product_(result[start:stop], down[start:stop], b.T, factor)


def up_gradients(
    grad: Tensor, down: Tensor, b: Tensor, factor: float, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those of Q = f · G B and dB = f · Gᵀ P that ``needs`` asks for."""
    up = torch.empty_like(down) if needs[0] else None
    grad_b = torch.zeros(b.shape, dtype=down.dtype, device=b.device) if needs[1] else None
    for start, stop in _chunks_of_narrow(grad, down.dtype):
        rows = grad[start:stop].to(down.dtype)
        if up is not None:
            torch.mul(_product(rows, b, down.dtype), factor, out=up[start:stop])
        if grad_b is not None:
            grad_b += rows.T @ down[start:stop]
    return up, None if grad_b is None else grad_b.mul_(factor).to(b.dtype)


def add_down_gradient_(
    grad_x: Tensor, x: Tensor, a: Tensor, up: Tensor, hashes: Tensor | None, place: int, p: float, needs: list[bool]
) -> Tensor | None:
    """``grad_x`` += keep · (Q A) in place, and dA = Qᵀ (keep · x), of them what ``needs`` asks for."""
    grad_a = torch.zeros(a.shape, dtype=up.dtype, device=x.device) if needs[1] else None
    rows = _MaskedRows(x, hashes, place, p)
    for start, stop in rows.chunks():
        part = up[start:stop]
        if needs[0]:
            kept = rows.add_gradient_(grad_x[start:stop], start, stop, part, a, read=needs[1])
        else:
            kept = rows.read(start, stop)
        if grad_a is not None and kept is not None:
            grad_a += _product(kept.T, part, up.dtype).T
    return None if grad_a is None else grad_a.to(a.dtype)


def _in_chunks(rows: Tensor, device: torch.device) -> int:
    return min(_chunk_rows(rows.shape[1], device), rows.shape[0])


def down_scratch(device: torch.device, x: Tensor, rank: int, hashes: Tensor | None, *, gradient: bool) -> int:
    """Bytes inside :func:`down_product` or, with ``gradient``, :func:`add_down_gradient_`."""
    # Chunks of rows of x [N, D] are masked, in backward together with what is added to their gradient, into copies, and
    # a 16-bit one is widened on the way; a block of 32-bit hashes lies beside them. A masked 32-bit product goes into a
    # 16-bit gradient by way of both in 32 bits.
    chunk = _in_chunks(x, device) * x.shape[1]
    narrow = 8 * chunk if x.element_size() < 4 else 0
    mask = 4 * min(HASHES_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else chunk, chunk)
    masked = chunk * (x.element_size() + 8) + mask
    widened = 4 * chunk if gradient and hashes is not None and x.element_size() < 4 else 0
    return (narrow if hashes is None else masked) + widened + 8 * rank * x.shape[1]


def up_scratch(device: torch.device, rows: Tensor, down: Tensor, b: Tensor) -> int:
    """Bytes inside :func:`add_up_` and :func:`up_gradients`: 16-bit rows [n, O] widened, twice."""
    small = 4 * (down.numel() + 2 * b.numel())
    return small if rows.element_size() >= 4 else small + _in_chunks(rows, device) * 8 * rows.shape[1]
