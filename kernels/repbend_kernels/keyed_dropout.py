"""``keyed_dropout``: dropout whose mask is a function of a key per row and a seed per place, not of a random generator's state.

    r[n] = high 32 bits of splitmix64(keys[n])          c[d] = fmix32(fmix32(column_seed) + d·0x9E3779B9)
    h[n, d] = mix(r[n] ^ c[d])                          mix(u) = (v ^ v >>> 15)·0x846CA68B with v = u·0x7FEB352D
    y[n, d] = x[n, d]/(1 − p) where h[n, d] ≥ p·2³², else 0       d loss/d x = the same mask and factor on d loss/d y

All of it in 32-bit integers but the row's key, so every implementation draws the same mask to the bit. ``mix`` is the middle of the
usual three-round finaliser: the shift before it is linear over ^ and keys are mixed already, the shift after it moves bits that the
comparison does not see.

No mask is stored: backward draws it again. Memory above the inputs: forward and backward, the tensor that it returns.

Legend: N rows, D width.
"""

import torch
from torch import Tensor

from . import checks
from .oracles import keyed_dropout_reference
from .rows import RowReader, blocks, count_rows
from .selection import resolve

WEYL = 0x9E3779B9
FIRST, SECOND = 0x7FEB352D, 0x846CA68B
_LOW = 0xFFFFFFFF


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


def _dropped_(hashes: Tensor, scratch: Tensor, threshold: int) -> Tensor:
    """``h < p·2³²`` (bool), ``hashes`` being ``r ^ c``; overwrites both. ``threshold`` is p·2³² moved by −2³¹, as signed hashes are."""
    hashes.mul_(FIRST)
    _xor_shift_(hashes, 15, 32, scratch)
    return hashes.mul_(_signed(SECOND, 32)) < threshold


def _torch_path(x: Tensor, keys: Tensor, start: int, threshold: int, factor: float) -> Tensor:
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, source = out.view(-1, width), RowReader(x)
    acc = checks.accumulate_dtype(x.dtype)
    rows, columns = row_hashes(keys)[:, None], column_hashes(start, width, x.device)
    hashes = scratch = torch.empty((0, width), dtype=torch.int32, device=x.device)
    for first, last in blocks(count_rows(x), width, x.device):
        if hashes.shape[0] != last - first:
            hashes = torch.empty((last - first, width), dtype=torch.int32, device=x.device)
            scratch = torch.empty_like(hashes)
        torch.bitwise_xor(rows[first:last], columns, out=hashes)
        dropped, block = _dropped_(hashes, scratch, threshold), flat[first:last]
        if factor == 1.0:
            block.copy_(source.read(first, last))
        elif x.dtype == acc:
            torch.mul(source.read(first, last), factor, out=block)
        else:
            block.copy_(source.read(first, last).to(acc).mul_(factor))
        block.masked_fill_(dropped, 0.0)
    return out


@torch.library.custom_op("repbend_kernels::keyed_dropout", mutates_args=())
def masked(x: Tensor, keys: Tensor, start: int, threshold: int, factor: float, implementation: str) -> Tensor:
    """``factor·x`` where kept, 0 elsewhere, of x's shape. ``start`` and ``threshold`` are signed 32-bit, see :func:`mask_arguments`."""
    if implementation == "triton":
        from .triton_keyed_dropout import launch

        return launch(x, keys, start, threshold, factor)
    return _torch_path(x, keys, start, threshold, factor)


@masked.register_fake
def _(x: Tensor, keys: Tensor, start: int, threshold: int, factor: float, implementation: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    _, keys, *ctx.settings = inputs
    ctx.save_for_backward(keys)


def _backward(ctx, grad):
    return masked(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


masked.register_autograd(_backward, setup_context=_setup)


def mask_arguments(column_seed: int, p: float) -> tuple[int, int]:
    """``(start, threshold)`` of the op: the mixed seed, and p·2³² moved to signed numbers."""
    return _signed(_fmix32(column_seed), 32), min(round(p * 2**32), _LOW) - 2**31


def keyed_dropout(x: Tensor, keys: Tensor, column_seed: int, p: float, *, scaled: bool = True, implementation: str | None = None) -> Tensor:
    """Dropout with the mask that ``(keys, column_seed)`` names: equal arguments drop equal elements, on every device and path.

    The mask of a row follows its key wherever the row lies, so a batch may be split, packed or repeated without another result.
    Source: splitmix64 (Steele et al. 2014) for keys, a 32-bit multiply-xorshift finaliser for elements.

    Args:
        x: [..., D] of any strides; a value that is dropped becomes 0 even if it is not finite.
        keys: int64 of x's leading shape, or flat [N]; any values, equal keys give equal masks.
        column_seed: names the place; two places with the same keys have unrelated masks. Its low 32 bits count.
        p: probability of dropping, 0 ≤ p < 1, to a precision of 2⁻³².
        scaled: False leaves out the factor 1/(1−p), for a caller that has it elsewhere.
        implementation: overrides the switch for this call.

    Returns:
        Tensor of x's shape and dtype, differentiable in ``x``; ``x`` itself where p = 0.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or probability.
        RuntimeError: ``triton`` asked for where it cannot run.
    """
    checks.check_states("x", x)
    _check_keys(keys, x)
    if not 0 <= p < 1:
        raise ValueError(f"p: expected 0 <= p < 1, got {p!r}")
    chosen = resolve(implementation, x)
    if p == 0:
        return x
    start, threshold = mask_arguments(column_seed, p)
    factor = 1 / (1 - p) if scaled else 1.0
    if chosen == "eager":
        return keyed_dropout_reference(x, keys, start, threshold, factor)
    return masked(x, keys.reshape(-1), start, threshold, factor, chosen)


def _check_keys(keys: Tensor, x: Tensor) -> None:
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64:
        raise TypeError(f"keys: expected an int64 tensor, got {keys.dtype if isinstance(keys, Tensor) else type(keys).__name__}")
    checks.check_device("keys", keys, "x", x)
    rows = count_rows(x)
    if keys.shape not in (x.shape[:-1], (rows,)):
        raise ValueError(f"keys: expected shape {list(x.shape[:-1])} or [{rows}] (one key for each row of x), got {list(keys.shape)}")
