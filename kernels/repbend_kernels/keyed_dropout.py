"""``keyed_dropout``: dropout whose mask is a function of a key per row and a seed per place, not of a random
generator's state.

    r[n] = high 32 bits of splitmix64(keys[n])          c[d] = fmix32(fmix32(column_seed) + d·0x9E3779B9)
    h[n, d] = ((r[n] ^ c[d])·0x7FEB352D ^ c'[d])·0x7B935975       c' is c with its 16-bit halves exchanged
    y[n, d] = x[n, d]/(1 − p) where h[n, d] > 2³¹ − (1 − p)·2³² as signed numbers, else 0
    d loss/d x = the same mask and factor on d loss/d y

All of it in 32-bit integers but the row's key, so every implementation draws the same mask to the bit. Rows and columns
are mixed before they meet, and a comparison looks at the high bits, which depend on all bits of both factors' products:
two multiplications do, and c' between them, unlike the finaliser's shift, costs one pass over the elements. h is a
bijection of r for each column.

No mask is stored: backward draws it again. Memory above the inputs: forward and backward, the tensor that it returns.

Legend: N rows, D width.
"""

from functools import cache, lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from . import checks
from .context import Context, Gradients
from .oracles import keyed_dropout_reference
from .rows import RowReader, blocks, count_rows, scale_into
from .scratch import in_blocks, scratch_rule
from .selection import resolve

WEYL = 0x9E3779B9
FIRST, SECOND = 0x7FEB352D, 0x846CA68B
"""Factors of the finaliser that mixes columns."""
LAST = 0x7B935975
"""−SECOND: the factor that ends an element's hash."""
_LOW = 0xFFFFFFFF
CPU_ELEMENTS_PER_THREAD = 1 << 18
"""Of a block of hashes, 1 MiB for each thread: on a CPU smaller ones lose more to their calls than they
gain by staying in the cache.
"""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

T = TypeVar("T", Tensor, list[Tensor])


def _signed(value: int, bits: int) -> int:
    """The same bits as a signed number, which is what torch's integer tensors and scalars hold."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _fmix32(value: int) -> int:
    value &= _LOW
    value = (value ^ (value >> 16)) * FIRST & _LOW
    value = (value ^ (value >> 15)) * SECOND & _LOW
    return value ^ (value >> 16)


def _xor_shift_(tensor: Tensor, shift: int, bits: int, scratch: Tensor) -> None:
    """tensor ^= tensor >>> shift. torch shifts arithmetically; the mask takes the sign's copies away."""
    torch.bitwise_right_shift(tensor, shift, out=scratch)
    tensor.bitwise_xor_(scratch.bitwise_and_((1 << (bits - shift)) - 1))


def row_hashes(keys: Tensor) -> Tensor:
    """``r``: int32 of the shape of ``keys`` (int64)."""
    mixed = keys + _signed(0x9E3779B97F4A7C15, 64)
    scratch = torch.empty_like(mixed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        _xor_shift_(mixed, shift, 64, scratch)
        mixed.mul_(_signed(factor, 64))
    _xor_shift_(mixed, 31, 64, scratch)
    return (mixed >> 32).to(torch.int32)


def column_hashes(start: int, width: int, device: torch.device) -> Tensor:
    """``c``: int32 [D], from the mixed column seed."""
    mixed = torch.arange(width, dtype=torch.int32, device=device).mul_(_signed(WEYL, 32)).add_(start)
    scratch = torch.empty_like(mixed)
    for shift, factor in ((16, FIRST), (15, SECOND)):
        _xor_shift_(mixed, shift, 32, scratch)
        mixed.mul_(_signed(factor, 32))
    _xor_shift_(mixed, 16, 32, scratch)
    return mixed


@lru_cache(maxsize=1024)
def _column_patterns(start: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(c, c')``, kept from step to step: a place's columns are always the same, 8 bytes each, and take twenty
    operations.
    """
    columns = column_hashes(start, width, device)
    return columns, (columns << 16) | (columns >> 16 & 0xFFFF)


class _Hashes:
    """``h``, block by block, for the masks of N rows; and the pass that clears what a mask drops."""

    def __init__(self, rows: Tensor, start: int, threshold: int, width: int) -> None:
        self.rows = rows[:, None]
        self.columns, self.exchanged = _column_patterns(start, width, rows.device)
        self.threshold = threshold
        self.hashes = torch.empty((0, width), dtype=torch.int32, device=rows.device)

    def read(self, first: int, last: int) -> Tensor:
        """Rows ``first … last-1``; the next call overwrites them."""
        count = last - first
        if self.hashes.shape[0] < count:
            self.hashes = self.hashes.new_empty((count, self.hashes.shape[1]))
        hashes = self.hashes[:count]
        torch.bitwise_xor(self.rows[first:last], self.columns, out=hashes)
        return hashes.mul_(FIRST).bitwise_xor_(self.exchanged).mul_(LAST)

    def clear_dropped(self, x: Tensor, hashes: Tensor, out: Tensor) -> None:
        """``out`` = x where h > threshold, else 0. One pass compares and clears, 16-bit elements being widened for it.
        It sees integers: no float is read, so a dropped NaN is 0 too.
        """
        bits, into = x.view(INTEGERS[x.dtype.itemsize]), out.view(INTEGERS[x.dtype.itemsize])
        if x.dtype.itemsize == 2:
            into.copy_(torch.ops.aten.threshold_backward(bits.to(torch.int32), hashes, self.threshold))
        else:
            torch.ops.aten.threshold_backward.grad_input(bits, hashes.to(bits.dtype), self.threshold, grad_input=into)


class KeyedMask:
    """The masks of N rows of one place, applied block by block without the factor 1/(1−p), inside an op that walks rows
    itself.

    In plain torch the keys are mixed once for all blocks and the scratch is used again; the kernel is launched once a
    block.

    Args:
        keys: int64 [N]; with ``hashed`` int32 [N], their :func:`row_hashes`, which places that share rows need not take
            again.
        column_seed, p: as :func:`keyed_dropout` takes them, p > 0.
        width, dtype: those of the rows.

    Raises:
        TypeError: keys of another dtype.
    """

    def __init__(
        self, keys: Tensor, column_seed: int, p: float, width: int, dtype: torch.dtype, *, hashed: bool = False
    ) -> None:
        expected = torch.int32 if hashed else torch.int64
        if keys.dtype != expected:
            raise TypeError(f"keys: expected an {str(expected).removeprefix('torch.')} tensor, got {keys.dtype}")
        self.keys, self.arguments = keys, mask_arguments(column_seed, p)
        self.triton = resolve(None, torch.empty(0, dtype=dtype, device=keys.device)) == "triton"
        self.hashes = None if self.triton else _Hashes(keys if hashed else row_hashes(keys), *self.arguments, width)
        # 16-bit rows are widened to the hashes' size, twice.
        self.per_thread = CPU_ELEMENTS_PER_THREAD // (4 if dtype.itemsize == 2 else 1)

    def apply(self, tensors: list[Tensor], outs: list[Tensor], first: int, last: int) -> None:
        """Each of ``outs`` = the tensor of ``tensors`` where kept, else 0; all [last − first, D], an out may be its
        tensor.
        """
        if self.hashes is None:
            from .triton.keyed_dropout import launch_into

            for x, out in zip(tensors, outs):
                launch_into(out, x, self.keys[first:last], *self.arguments, 1.0)
            return
        for start, stop in blocks(last - first, tensors[0].shape[-1], self.keys.device, self.per_thread):
            hashes = self.hashes.read(first + start, first + stop)
            for x, out in zip(tensors, outs):
                self.hashes.clear_dropped(x[start:stop], hashes, out[start:stop])


def _torch_path(tensors: list[Tensor], keys: Tensor, start: int, threshold: int, factor: float) -> list[Tensor]:
    width, dtype, device = tensors[0].shape[-1], tensors[0].dtype, keys.device
    outs = [torch.empty(x.shape, dtype=dtype, device=device) for x in tensors]
    pairs = [(out.view(-1, width), RowReader(x)) for out, x in zip(outs, tensors)]
    mask = _Hashes(row_hashes(keys), start, threshold, width)
    scale = torch.full(
        (), factor, dtype=checks.accumulate_dtype(dtype), device=device
    )  # made there: a copy would wait for the GPU
    for first, last in blocks(keys.numel(), width, device):
        hashes = mask.read(first, last)
        for out, source in pairs:
            block = out[first:last]
            mask.clear_dropped(source.read(first, last), hashes, block)
            if factor != 1.0:
                scale_into(block, block, scale)
    return outs


@torch.library.custom_op("repbend_kernels::keyed_dropout", mutates_args=())
def masked(
    tensors: list[Tensor], keys: Tensor, start: int, threshold: int, factor: float, implementation: str
) -> list[Tensor]:
    """For each of ``tensors`` ``factor·x`` where kept and 0 elsewhere; ``start`` and ``threshold`` are those of
    :func:`mask_arguments`.
    """
    if implementation == "triton":
        from .triton.keyed_dropout import launch

        return [launch(x, keys, start, threshold, factor) for x in tensors]
    return _torch_path(tensors, keys, start, threshold, factor)


@masked.register_fake
def _(
    tensors: list[Tensor], keys: Tensor, start: int, threshold: int, factor: float, implementation: str
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors]


def _setup(ctx: Context, inputs: tuple[list[Tensor], Tensor, int, int, float, str], output: list[Tensor]) -> None:
    _, keys, *ctx.settings = inputs
    ctx.save_for_backward(keys)


def _backward(ctx: Context, grads: list[Tensor | None]) -> Gradients:
    found = iter(masked([grad for grad in grads if grad is not None], *ctx.saved_tensors, *ctx.settings))
    return [None if grad is None else next(found) for grad in grads], None, None, None, None, None


masked.register_autograd(_backward, setup_context=_setup)


@cache
def mask_arguments(column_seed: int, p: float) -> tuple[int, int]:
    """``(start, threshold)`` of the op: the mixed seed, and 2³¹ − (1 − p)·2³², inside the signed numbers."""
    return _signed(_fmix32(column_seed), 32), 2**31 - min(max(round((1 - p) * 2**32), 1), _LOW)


def keyed_dropout(
    x: T, keys: Tensor, column_seed: int, p: float, *, scaled: bool = True, implementation: str | None = None
) -> T:
    """Dropout with the mask that ``(keys, column_seed)`` names: equal arguments drop equal elements, on every device
    and path.

    The mask of a row follows its key wherever the row lies, so a batch may be split, packed or repeated without another
    result. Sources: splitmix64 (Steele et al. 2014) for keys, a 32-bit finaliser for columns; for elements its two
    multiplications.

    Args:
        x: [..., D] of any strides, or a list of such tensors of one shape and dtype, which get one mask. What is
            dropped becomes 0 even if it is not finite.
        keys: int64 of x's leading shape, or flat [N]; any values, equal keys give equal masks.
        column_seed: names the place; two places with the same keys have unrelated masks. Its low 32 bits count.
        p: probability of dropping, 0 ≤ p < 1, to a precision of 2⁻³².
        scaled: False leaves out the factor 1/(1−p), for a caller that has it elsewhere.
        implementation: overrides the switch for this call.

    Returns:
        What ``x`` is, of the same shape and dtype, differentiable in ``x``; ``x`` itself where p = 0.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or probability.
        RuntimeError: ``triton`` asked for where it cannot run.
    """
    tensors = [x] if isinstance(x, Tensor) else list(x)
    _check(tensors, keys, p)
    chosen = resolve(implementation, tensors[0])
    if p == 0:
        return x
    start, threshold = mask_arguments(column_seed, p)
    factor = 1 / (1 - p) if scaled else 1.0
    if chosen == "eager":
        results = [keyed_dropout_reference(tensor, keys, start, threshold, factor) for tensor in tensors]
    else:
        results = masked(tensors, keys.reshape(-1), start, threshold, factor, chosen)
    return results[0] if isinstance(x, Tensor) else results


def _check(tensors: list[Tensor], keys: Tensor, p: float) -> None:
    if not tensors:
        raise ValueError("x: expected at least one tensor, got none")
    for index, tensor in enumerate(tensors):
        checks.check_states("x" if len(tensors) == 1 else f"x[{index}]", tensor)
        if index:
            checks.check_like(f"x[{index}]", tensor, "x[0]", tensors[0])
            checks.check_shape(f"x[{index}]", tensor, tensors[0].shape, "as x[0]")
    _check_keys(keys, tensors[0])
    if not 0 <= p < 1:
        raise ValueError(f"p: expected 0 <= p < 1, got {p!r}")


def _check_keys(keys: Tensor, x: Tensor) -> None:
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64:
        raise TypeError(
            f"keys: expected an int64 tensor, got {keys.dtype if isinstance(keys, Tensor) else type(keys).__name__}"
        )
    checks.check_device("keys", keys, "x", x)
    rows = count_rows(x)
    if keys.shape not in (x.shape[:-1], (rows,)):
        raise ValueError(
            f"keys: expected shape {list(x.shape[:-1])} or [{rows}] (one key for each row of x), got {list(keys.shape)}"
        )


@scratch_rule("keyed_dropout")
def _(device: torch.device, tensors: list[Tensor], keys: Tensor) -> int:
    # Of a block: hashes, a 16-bit element widened twice or a wide one's hashes widened, the product; and the rows'
    # mixed keys.
    return in_blocks(device, 5, tensors[0].numel()) + 24 * keys.numel()
