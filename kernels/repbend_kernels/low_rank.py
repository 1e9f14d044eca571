"""``lora_down`` and ``lora_up``: the low-rank part of an adapted linear layer, around whatever the base layer is.

With m = keep · x (``keyed_dropout``'s mask, without its factor), W the base layer, f the factor of the whole low-rank
part:

    lora_down    P = m Aᵀ  [N, r]                       lora_up    y = W x + f · P Bᵀ           in place: y = W x is
                 fresh
    backward     dx += keep · (Q A)    dA = Qᵀ m                   Q = f · G B    dB = f · Gᵀ P
                 in place: the base layer's gradient is fresh

Kept for backward: x by reference, or what it can be made of again; P; and the rows' hashed keys. Memory above the
inputs: forward, P; backward, Q and the gradients of A and B.

Products of 16-bit rows lose nothing of 32-bit adapter weights: on CUDA the weight enters the matrix product as the sum
of two 16-bit parts (in float16 only what its range holds: parts below 6e-8 are lost), elsewhere the rows are widened
chunk by chunk (``wide_products``). Rows are walked in chunks, so that what is masked never has x's size.

Legend: N rows (tokens), D inputs, O outputs, r rank, G gradient of y.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import checks
from .checks import accumulate_dtype, in_own_dtypes
from .context import Context, Gradients
from .keyed_dropout import CPU_ELEMENTS_PER_THREAD as HASHES_PER_THREAD
from .keyed_dropout import KeyedMask, mask_arguments
from .oracles import lora_down_reference, lora_up_reference
from .scratch import scratch_rule
from .selection import resolve
from .wide_products import add_product_, in_parts, low_rank_operands, product

# Elements of a chunk of rows. On a CPU smaller ones, which stay in a core's cache, are no faster (docs/log.md); on a
# GPU it fills the device and is small beside a model. A matrix product of fewer rows than the least would read the
# adapter's weights too often.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 24}
LEAST_ROWS = 64

Remake = tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], Tensor]]
"""What backward keeps in place of a tensor, and how it makes the tensor of that."""


def _chunk_rows(width: int, device: torch.device) -> int:
    return max(LEAST_ROWS, CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "other"] // width)


def _chunks(rows: Tensor) -> Iterator[tuple[int, int]]:
    count, width = rows.shape
    step = _chunk_rows(width, rows.device)
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _chunks_of_narrow(rows: Tensor, acc: torch.dtype) -> Iterator[tuple[int, int]]:
    """Chunks of 16-bit ``rows`` [N, width], whose products need operands of their own; others all at once."""
    return iter([(0, rows.shape[0])]) if rows.dtype == acc else _chunks(rows)


class _MaskedRows:
    """What dropout leaves of chunks of rows of x, and the same mask on what goes back to them; a buffer serves every
    chunk.
    """

    def __init__(self, x: Tensor, hashes: Tensor | None, place: int, p: float) -> None:
        self.mask = None if hashes is None else KeyedMask(hashes, place, p, x.shape[1], x.dtype, hashed=True)
        self.x, self.buffer = x, x.new_empty((0, x.shape[1]))

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
        """``grad_rows`` += keep · (Q A), Q being ``up``, rounded once where the device allows it; with ``read`` the
        rows of x, masked.
        """
        if self.mask is None:
            add_product_(grad_rows, up, a, 1.0)
            return self.read(start, stop) if read else None
        if in_parts(up) and grad_rows.dtype != up.dtype:
            inner = torch.mm(*low_rank_operands(up, a, grad_rows.dtype))
        else:
            inner = up @ a.to(up.dtype)
        kept = None
        if read:
            kept = self.read(start, stop, inner)
        else:
            self.mask.apply([inner], [inner], start, stop)
        grad_rows.add_(inner)
        return kept


def _down(x: Tensor, a: Tensor, hashes: Tensor | None, place: int, p: float) -> Tensor:
    acc = accumulate_dtype(x.dtype)
    down = x.new_empty((x.shape[0], a.shape[0]), dtype=acc)
    rows = _MaskedRows(x, hashes, place, p)
    with in_own_dtypes(x.device):
        for start, stop in _chunks(x):
            down[start:stop] = product(rows.read(start, stop), a.T, acc)
    return down


def _add_up_(result: Tensor, down: Tensor, b: Tensor, factor: float) -> None:
    with in_own_dtypes(result.device):
        for start, stop in _chunks_of_narrow(result, down.dtype):
            add_product_(result[start:stop], down[start:stop], b.T, factor)


@torch.library.custom_op("repbend_kernels::low_rank_down", mutates_args=())
def low_rank_down(x: Tensor, a: Tensor, hashes: Tensor | None, place: int, p: float) -> Tensor:
    """P = (keep · x) Aᵀ, [N, r] in float32 (float64 for float64), of ``x`` [N, D]; ``hashes`` are the rows' hashed
    keys, int32 [N].
    """
    return _down(x, a, hashes, place, p)


@low_rank_down.register_fake
def _(x: Tensor, a: Tensor, hashes: Tensor | None, place: int, p: float) -> Tensor:
    return x.new_empty((x.shape[0], a.shape[0]), dtype=accumulate_dtype(x.dtype))


@torch.library.custom_op("repbend_kernels::add_low_rank_gradient_", mutates_args={"grad_x"})
def add_low_rank_gradient_(
    grad_x: Tensor, x: Tensor, a: Tensor, up: Tensor, hashes: Tensor | None, place: int, p: float, needs: list[bool]
) -> Tensor:
    """``grad_x`` [N, D] += keep · (Q A) in place and dA = Qᵀ (keep · x) in A's dtype, of them what ``needs`` asks for
    (dA else [0, D]).

    ``up`` is Q [N, r] in float32 (float64 for float64), in which the sum over rows runs.
    """
    grad_a = torch.zeros((a.shape[0] if needs[1] else 0, a.shape[1]), dtype=up.dtype, device=x.device)
    rows = _MaskedRows(x, hashes, place, p)
    with in_own_dtypes(x.device):
        for start, stop in _chunks(x):
            part = up[start:stop]
            if needs[0]:
                kept = rows.add_gradient_(grad_x[start:stop], start, stop, part, a, read=needs[1])
            else:
                kept = rows.read(start, stop)
            if kept is not None:
                grad_a += product(kept.T, part, up.dtype).T
    return grad_a.to(a.dtype)


@add_low_rank_gradient_.register_fake
def _(
    grad_x: Tensor, x: Tensor, a: Tensor, up: Tensor, hashes: Tensor | None, place: int, p: float, needs: list[bool]
) -> Tensor:
    return a.new_empty((a.shape[0] if needs[1] else 0, a.shape[1]))


@torch.library.custom_op("repbend_kernels::add_low_rank_up_", mutates_args={"result"})
def add_low_rank_up_(result: Tensor, down: Tensor, b: Tensor, factor: float) -> None:
    """``result`` [N, O] += f · P Bᵀ in place, P being ``down`` [N, r]."""
    _add_up_(result, down, b, factor)


@torch.library.custom_op("repbend_kernels::low_rank_up_gradients", mutates_args=())
def low_rank_up_gradients(grad: Tensor, down: Tensor, b: Tensor, factor: float, needs: list[bool]) -> list[Tensor]:
    """Those of Q = f · G B [N, r] in P's dtype and dB = f · Gᵀ P in B's that ``needs`` asks for; the sum over rows runs
    in P's dtype.
    """
    up = torch.empty_like(down)
    grad_b = torch.zeros(b.shape, dtype=down.dtype, device=b.device)
    with in_own_dtypes(grad.device):
        for start, stop in _chunks_of_narrow(grad, down.dtype):
            rows = grad[start:stop]
            if needs[0]:
                torch.mul(product(rows, b, down.dtype), factor, out=up[start:stop])
            if needs[1]:
                grad_b += product(rows.T, down[start:stop], down.dtype)
    results = (up, grad_b.mul_(factor).to(b.dtype))
    return [result for result, needed in zip(results, needs) if needed]


@low_rank_up_gradients.register_fake
def _(grad: Tensor, down: Tensor, b: Tensor, factor: float, needs: list[bool]) -> list[Tensor]:
    return [like.new_empty(like.shape) for like, needed in zip((down, b), needs) if needed]


class _Down(torch.autograd.Function):
    """``(x, P)``. The base layer reads this x: its gradient comes through here and takes the low-rank part in."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, a: Tensor, hashes: Tensor | None, place: int, p: float, remake: Remake | None = None
    ) -> tuple[Tensor, Tensor]:
        kept, ctx.make = ((x,), None) if remake is None else remake
        ctx.save_for_backward(a, hashes, *kept)
        ctx.settings = place, p
        ctx.set_materialize_grads(False)
        return x, low_rank_down(x, a, hashes, place, p)

    @staticmethod
    def backward(ctx: Context, grad_x: Tensor | None, up: Tensor | None) -> Gradients:
        needs = list(ctx.needs_input_grad[:2])
        if up is None:
            return grad_x, None, None, None, None, None
        checks.check_first_derivative("lora_down")
        a, hashes, *kept = ctx.saved_tensors
        x = kept[0] if ctx.make is None else ctx.make(kept)
        x = x.reshape(-1, x.shape[-1])
        if grad_x is None:
            grad_x = torch.zeros_like(x) if needs[0] else x.new_empty((0, x.shape[1]))
        grad_a = add_low_rank_gradient_(grad_x, x, a, up, hashes, *ctx.settings, needs)
        return grad_x if needs[0] else None, grad_a if needs[1] else None, None, None, None, None


class _Up(torch.autograd.Function):
    """``result`` [N, O] with f · P Bᵀ added in place; in a compiled graph to a copy: its inputs must not change."""

    @staticmethod
    def forward(ctx: Context, result: Tensor, down: Tensor, b: Tensor, factor: float) -> Tensor:
        if torch.compiler.is_compiling():
            result = result.clone()
        else:
            ctx.mark_dirty(result)
        add_low_rank_up_(result, down, b, factor)
        ctx.save_for_backward(down, b)
        ctx.factor = factor
        return result

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        checks.check_first_derivative("lora_up")
        needs = list(ctx.needs_input_grad[1:3])
        found = iter(low_rank_up_gradients(grad, *ctx.saved_tensors, ctx.factor, needs))
        return grad, *(next(found) if needed else None for needed in needs), None


def lora_down(
    x: Tensor,
    a: Tensor,
    hashes: Tensor | None = None,
    place: int = 0,
    p: float = 0.0,
    *,
    remake: Remake | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The first half of a low-rank adapter, P = (keep · x) Aᵀ, and x for the base layer; differentiable in ``x`` and
    ``a``.

    Args:
        x: [N, D], what the adapted layer reads.
        a: [r, D], of ``x``'s dtype or a wider one.
        hashes: int32 [N], ``blocks.row_hashes`` of the rows' keys; None for no dropout.
        place: names the layer, as :func:`keyed_dropout`'s ``column_seed`` does.
        p: probability of dropping, 0 < p < 1 with ``hashes``. The factor 1/(1 − p) belongs into :func:`lora_up`'s.
        remake: ``(kept, make)``: backward keeps the tensors ``kept`` in place of x, and ``make(kept)`` gives x again,
            [..., D].
        implementation: overrides the switch for this call. There is no kernel of its own: ``triton`` and ``torch`` are
            the same products, with the mask drawn as :func:`keyed_dropout` draws it.

    Returns:
        ``(x, P)``: x for the base layer to read, and P [N, r] in float32 (float64 for float64). Backward adds to the
        gradient that comes back through that x **in place**, so only an operation that makes a fresh one, such as a
        matrix product, may read it.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or probability.
        RuntimeError: ``triton`` asked for where it cannot run; in backward, ``create_graph=True``.
    """
    _check_down(x, a, hashes, p)
    if resolve(implementation, x) == "eager":
        return lora_down_reference(x, a, hashes, *((0, 0) if hashes is None else mask_arguments(place, p)))
    if hashes is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Generating comes here for each token, where an op and an autograd function cost more than their work.
        return x, _down(x, a, None, place, p)
    return _Down.apply(x, a, hashes, place, p, remake)


def lora_up(result: Tensor, down: Tensor, b: Tensor, factor: float, *, implementation: str | None = None) -> Tensor:
    """The second half of a low-rank adapter: ``result`` + f · P Bᵀ, differentiable in ``result``, ``down`` and ``b``.

    Args:
        result: [N, O], the base layer's output, **overwritten** (not in a compiled graph): nobody else may need its
            values.
        down: P [N, r] of :func:`lora_down`.
        b: [O, r], of ``result``'s dtype or a wider one.
        factor: f, the adapter's scaling, over 1 − p where there is dropout.
        implementation: overrides the switch for this call; ``triton`` and ``torch`` are the same products.

    Returns:
        ``result``, rounded once to its dtype.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device.
        RuntimeError: ``triton`` asked for where it cannot run; in backward, ``create_graph=True``.
    """
    _check_up(result, down, b)
    if resolve(implementation, result) == "eager":
        return lora_up_reference(result, down, b, factor)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _add_up_(result, down, b, factor)
        return result
    return _Up.apply(result, down, b, factor)


def _check_matrix(name: str, tensor: Tensor, rows: str | int, columns: str | int) -> None:
    """``tensor`` is [rows, columns], of any size where that is a letter."""
    checks.check_float(name, tensor)
    shape = tensor.shape
    fits = (
        len(shape) == 2
        and (isinstance(rows, str) or shape[0] == rows)
        and (isinstance(columns, str) or shape[1] == columns)
    )
    if not fits:
        raise ValueError(f"{name}: expected shape [{rows}, {columns}], got {list(shape)}")


def _check_down(x: Tensor, a: Tensor, hashes: Tensor | None, p: float) -> None:
    _check_matrix("x", x, "N", "D")
    _check_matrix("a", a, "r", x.shape[1])
    checks.check_device("a", a, "x", x)
    if hashes is None:
        return
    if not isinstance(hashes, Tensor) or hashes.dtype != torch.int32:
        raise TypeError(
            "hashes: expected an int32 tensor, got "
            f"{hashes.dtype if isinstance(hashes, Tensor) else type(hashes).__name__}"
        )
    checks.check_device("hashes", hashes, "x", x)
    checks.check_shape("hashes", hashes, [x.shape[0]], "one for each row of x")
    if not 0 < p < 1:
        raise ValueError(f"p: expected 0 < p < 1 with hashes, got {p!r}")


def _check_up(result: Tensor, down: Tensor, b: Tensor) -> None:
    _check_matrix("result", result, "N", "O")
    _check_matrix("down", down, result.shape[0], "r")
    _check_matrix("b", b, result.shape[1], down.shape[1])
    if down.dtype != accumulate_dtype(result.dtype):
        raise TypeError(
            f"down: expected {accumulate_dtype(result.dtype)} beside a result in {result.dtype}, got {down.dtype}"
        )
    checks.check_device("down", down, "result", result)
    checks.check_device("b", b, "result", result)


def _in_chunks(rows: Tensor, device: torch.device) -> int:
    return min(_chunk_rows(rows.shape[1], device), rows.shape[0])


def _down_scratch(device: torch.device, x: Tensor, a: Tensor, hashes: Tensor | None) -> int:
    # Chunks of rows of x [N, D] are masked, in backward together with what is added to their gradient, into copies; a
    # 16-bit one is widened on the way where the product is not the GPU's. In plain torch a block of 32-bit hashes lies
    # beside them.
    chunk = _in_chunks(x, device) * x.shape[1]
    wide = 4 if device.type != "cuda" else x.element_size()
    narrow = 2 * wide * chunk if x.element_size() < 4 else 0
    mask = 0 if device.type == "cuda" else 4 * min(HASHES_PER_THREAD * torch.get_num_threads(), chunk)
    masked = chunk * (x.element_size() + 2 * wide) + mask
    return (narrow if hashes is None else masked) + 2 * 4 * a.numel()


def _up_scratch(device: torch.device, rows: Tensor, down: Tensor, b: Tensor) -> int:
    # A product of 16-bit rows [n, O] with 32-bit ones: their parts side by side on CUDA, elsewhere the rows widened,
    # twice.
    small = 4 * (down.numel() + 2 * b.numel())
    if rows.element_size() >= 4:
        return small
    width = 6 * down.shape[1] if device.type == "cuda" else 8 * rows.shape[1]
    return small + _in_chunks(rows, device) * width


scratch_rule("low_rank_down")(_down_scratch)


@scratch_rule("add_low_rank_gradient_")
def _(device: torch.device, x: Tensor, a: Tensor, hashes: Tensor | None) -> int:
    # A CPU adds the masked 32-bit product to a 16-bit gradient by way of both in 32 bits, of which the rule above knows
    # one.
    widened = hashes is not None and x.element_size() < 4 and device.type != "cuda"
    return _down_scratch(device, x, a, hashes) + (4 * _in_chunks(x, device) * x.shape[1] if widened else 0)


@scratch_rule("add_low_rank_up_")
def _(device: torch.device, result: Tensor, down: Tensor, b: Tensor) -> int:
    return _up_scratch(device, result, down, b)


@scratch_rule("low_rank_up_gradients")
def _(device: torch.device, grad: Tensor, down: Tensor, b: Tensor) -> int:
    return _up_scratch(device, grad, down, b)
