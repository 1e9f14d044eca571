"""``lora_down`` and ``lora_up``: the low-rank part of an adapted linear layer, around whatever the base layer is.

With m = keep · x (``keyed_dropout``'s mask, without its factor), W the base layer, f the factor of the whole low-rank
part:

    lora_down    P = m Aᵀ  [N, r]                       lora_up    y = W x + f · P Bᵀ           in place: y = W x is
                 fresh
    backward     dx += keep · (Q A)    dA = Qᵀ m                   Q = f · G B    dB = f · Gᵀ P
                 in place: the base layer's gradient is fresh

Up to three layers that read one x (q, k and v; gate and up) share one mask: their A count as one matrix,
[A_1; A_2; A_3], x is read once for all of them, and each gets its P.

Kept for backward: x by reference, or what it can be made of again; P; and the rows' hashed keys. Memory above the
inputs: forward, P; backward, Q and the gradients of A and B. The kernels add parts of the sums (Q, dA, dB), which grow
with N·r and with (D + O)·r; the torch path chunks of rows (``low_rank_chunks``).

Products of 16-bit rows lose nothing of 32-bit adapter weights. Sums have one order: results repeat to the bit.

Legend: N rows (tokens), D inputs, O outputs, r rank, G gradient of y.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import overload

import torch
from torch import Tensor

from . import checks, low_rank_chunks
from .checks import accumulate_dtype, in_own_dtypes
from .context import Context, Gradients
from .keyed_dropout import mask_arguments
from .low_rank_sizes import MOST_SHARED, parts_bytes
from .oracles import lora_down_reference, lora_up_reference
from .scratch import scratch_rule
from .selection import launches_alone, resolve

Remake = tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], Tensor]]
"""What backward keeps in place of a tensor, and how it makes the tensor of that."""


@cache
def _launches() -> ModuleType:
    """Imported with the first launch, since Triton may be absent; an import statement costs at every call."""
    from .triton import low_rank_launch

    return low_rank_launch


def _stacked(matrices: list[Tensor], dim: int = 0) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim)


def _down(x: Tensor, a: list[Tensor], hashes: Tensor | None, place: int, p: float, implementation: str) -> Tensor:
    if implementation == "triton":
        return _launches().launch_down(x, a, hashes, *mask_arguments(place, p))
    with in_own_dtypes(x.device):
        return low_rank_chunks.down_product(x, _stacked(a), hashes, place, p)


def _add_up_(result: Tensor, down: Tensor, b: Tensor, factor: float, implementation: str) -> None:
    if implementation == "triton":
        _launches().launch_up(result, down, b, factor)
        return
    with in_own_dtypes(result.device):
        low_rank_chunks.add_up_(result, down, b, factor)


def _add_down_gradient_(
    grad_x: Tensor,
    x: Tensor,
    a: list[Tensor],
    up: list[Tensor],
    hashes: Tensor | None,
    place: int,
    p: float,
    needs: list[bool],
    implementation: str,
) -> Tensor | None:
    if implementation == "triton":
        return _launches().launch_down_backward(grad_x, x, a, up, hashes, *mask_arguments(place, p), needs)
    with in_own_dtypes(x.device):
        stacked = _stacked(a), _stacked(up, 1)
        return low_rank_chunks.add_down_gradient_(grad_x, x, *stacked, hashes, place, p, needs)


def _up_gradients(
    grad: Tensor, down: Tensor, b: Tensor, factor: float, needs: list[bool], implementation: str
) -> tuple[Tensor | None, Tensor | None]:
    if implementation == "triton":
        return _launches().launch_up_backward(grad, down, b, factor, needs)
    with in_own_dtypes(grad.device):
        return low_rank_chunks.up_gradients(grad, down, b, factor, needs)


@torch.library.custom_op("repbend_kernels::low_rank_down", mutates_args=())
def low_rank_down(
    x: Tensor, a: list[Tensor], hashes: Tensor | None, place: int, p: float, implementation: str
) -> Tensor:
    """P = (keep · x) Aᵀ, [N, r] in float32 (float64 for float64), of ``x`` [N, D] and A, one or several matrices below
    each other, r rows in all; ``hashes`` are the rows' hashed keys, int32 [N].
    """
    return _down(x, a, hashes, place, p, implementation)


@low_rank_down.register_fake
def _(x: Tensor, a: list[Tensor], hashes: Tensor | None, place: int, p: float, implementation: str) -> Tensor:
    return x.new_empty((x.shape[0], sum(each.shape[0] for each in a)), dtype=accumulate_dtype(x.dtype))


@torch.library.custom_op("repbend_kernels::add_low_rank_gradient_", mutates_args={"grad_x"})
def add_low_rank_gradient_(
    grad_x: Tensor,
    x: Tensor,
    a: list[Tensor],
    up: list[Tensor],
    hashes: Tensor | None,
    place: int,
    p: float,
    needs: list[bool],
    implementation: str,
) -> Tensor:
    """``grad_x`` [N, D] += keep · (Q A) in place and dA = Qᵀ (keep · x) [r, D] in A's dtype, of them what ``needs``
    asks for (dA else [0, D]).

    ``a`` are one or several matrices, r rows in all, ``up`` the Q [N, rows] of each in float32 (float64 for float64),
    in which the sum over rows runs.
    """
    grad_a = _add_down_gradient_(grad_x, x, a, up, hashes, place, p, needs, implementation)
    return a[0].new_empty((0, x.shape[1])) if grad_a is None else grad_a


@add_low_rank_gradient_.register_fake
def _(
    grad_x: Tensor,
    x: Tensor,
    a: list[Tensor],
    up: list[Tensor],
    hashes: Tensor | None,
    place: int,
    p: float,
    needs: list[bool],
    implementation: str,
) -> Tensor:
    return a[0].new_empty((sum(each.shape[0] for each in a) if needs[1] else 0, x.shape[1]))


@torch.library.custom_op("repbend_kernels::add_low_rank_up_", mutates_args={"result"})
def add_low_rank_up_(result: Tensor, down: Tensor, b: Tensor, factor: float, implementation: str) -> None:
    """``result`` [N, O] += f · P Bᵀ in place, P being ``down`` [N, r]."""
    _add_up_(result, down, b, factor, implementation)


@torch.library.custom_op("repbend_kernels::low_rank_up_gradients", mutates_args=())
def low_rank_up_gradients(
    grad: Tensor, down: Tensor, b: Tensor, factor: float, needs: list[bool], implementation: str
) -> list[Tensor]:
    """Those of Q = f · G B [N, r] in P's dtype and dB = f · Gᵀ P in B's that ``needs`` asks for; the sum over rows runs
    in P's dtype.
    """
    results = _up_gradients(grad, down, b, factor, needs, implementation)
    return [result for result in results if result is not None]


@low_rank_up_gradients.register_fake
def _(grad: Tensor, down: Tensor, b: Tensor, factor: float, needs: list[bool], implementation: str) -> list[Tensor]:
    return [like.new_empty(like.shape) for like, needed in zip((down, b), needs) if needed]


def parts_of(joint: Tensor, sizes: list[int], dim: int = 1) -> Sequence[Tensor]:
    """The matrices that ``joint`` is made of, as views."""
    return [joint] if len(sizes) == 1 else joint.split(sizes, dim=dim)


# Each runs its op, or what is inside the op where nobody looks on.
def down_product(
    x: Tensor, a: list[Tensor], hashes: Tensor | None, place: int, p: float, implementation: str
) -> Tensor:
    """As :func:`low_rank_down`."""
    run = _down if launches_alone(implementation, x) else low_rank_down
    return run(x, a, hashes, place, p, implementation)


def add_up(result: Tensor, down: Tensor, b: Tensor, factor: float, implementation: str) -> None:
    """As :func:`add_low_rank_up_`."""
    run = _add_up_ if launches_alone(implementation, result) else add_low_rank_up_
    run(result, down, b, factor, implementation)


def up_gradients(
    grad: Tensor, down: Tensor, b: Tensor, factor: float, needs: list[bool], implementation: str
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`low_rank_up_gradients`, with None for what ``needs`` does not ask for."""
    if launches_alone(implementation, grad):
        return _up_gradients(grad, down, b, factor, needs, implementation)
    found = iter(low_rank_up_gradients(grad, down, b, factor, needs, implementation))
    return next(found) if needs[0] else None, next(found) if needs[1] else None


def add_down_gradient(
    grad_x: Tensor,
    x: Tensor,
    a: list[Tensor],
    up: list[Tensor],
    hashes: Tensor | None,
    place: int,
    p: float,
    needs: list[bool],
    implementation: str,
) -> Tensor | None:
    """As :func:`add_low_rank_gradient_`, with None for a dA that ``needs`` does not ask for."""
    if launches_alone(implementation, x):
        return _add_down_gradient_(grad_x, x, a, up, hashes, place, p, needs, implementation)
    grad_a = add_low_rank_gradient_(grad_x, x, a, up, hashes, place, p, needs, implementation)
    return grad_a if needs[1] else None


def source_rows(make: Callable[[Sequence[Tensor]], Tensor] | None, kept: Sequence[Tensor]) -> Tensor:
    """x [N, D] in backward: what was ``kept``, or made of it."""
    x = kept[0] if make is None else make(kept)
    return x.reshape(-1, x.shape[-1])


class _Down(torch.autograd.Function):
    """``(x, P of each a)``. The base layers read this x: its gradient comes through here and takes the low-rank part
    in.
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        hashes: Tensor | None,
        place: int,
        p: float,
        remake: Remake | None,
        implementation: str,
        *a: Tensor,
    ) -> tuple[Tensor, ...]:
        kept, ctx.make = ((x,), None) if remake is None else remake
        ctx.save_for_backward(hashes, *a, *kept)
        ctx.settings, ctx.implementation, ctx.ranks = (place, p), implementation, [each.shape[0] for each in a]
        ctx.set_materialize_grads(False)
        return x, *parts_of(down_product(x, list(a), hashes, place, p, implementation), ctx.ranks)

    @staticmethod
    def backward(ctx: Context, grad_x: Tensor | None, *ups: Tensor | None) -> Gradients:
        needs = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[6:])]
        some = next((up for up in ups if up is not None), None)
        if some is None:
            return grad_x, *[None] * (5 + len(ups))
        checks.check_first_derivative("lora_down")
        hashes, *kept = ctx.saved_tensors
        a, kept = kept[: len(ups)], kept[len(ups) :]
        x = source_rows(ctx.make, kept)
        if grad_x is None:
            grad_x = torch.zeros_like(x) if needs[0] else x.new_empty((0, x.shape[1]))
        up = [some.new_zeros((x.shape[0], rank)) if up is None else up for up, rank in zip(ups, ctx.ranks)]
        (place, p), chosen = ctx.settings, ctx.implementation
        grad_a = add_down_gradient(grad_x, x, a, up, hashes, place, p, needs, chosen)
        grads = [None] * len(ups) if grad_a is None else parts_of(grad_a, ctx.ranks, 0)
        asked = ctx.needs_input_grad[6:]
        return grad_x if needs[0] else None, *[None] * 5, *(g if needed else None for g, needed in zip(grads, asked))


class _Up(torch.autograd.Function):
    """``result`` [N, O] with f · P Bᵀ added in place; in a compiled graph to a copy: its inputs must not change."""

    @staticmethod
    def forward(
        ctx: Context, result: Tensor, down: Tensor, b: Tensor, factor: float, implementation: str = "torch"
    ) -> Tensor:
        if torch.compiler.is_compiling():
            result = result.clone()
        else:
            ctx.mark_dirty(result)
        add_up(result, down, b, factor, implementation)
        ctx.save_for_backward(down, b)
        ctx.settings = factor, implementation
        return result

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        checks.check_first_derivative("lora_up")
        needs = list(ctx.needs_input_grad[1:3])
        (factor, implementation), (down, b) = ctx.settings, ctx.saved_tensors
        return grad, *up_gradients(grad, down, b, factor, needs, implementation), None, None


@overload
def lora_down(
    x: Tensor,
    a: Tensor,
    hashes: Tensor | None = None,
    place: int = 0,
    p: float = 0.0,
    *,
    remake: Remake | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def lora_down(
    x: Tensor,
    a: Sequence[Tensor],
    hashes: Tensor | None = None,
    place: int = 0,
    p: float = 0.0,
    *,
    remake: Remake | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, list[Tensor]]: ...


def lora_down(
    x: Tensor,
    a: Tensor | Sequence[Tensor],
    hashes: Tensor | None = None,
    place: int = 0,
    p: float = 0.0,
    *,
    remake: Remake | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | list[Tensor]]:
    """The first half of a low-rank adapter, P = (keep · x) Aᵀ, and x for the base layer; differentiable in ``x`` and
    ``a``.

    Args:
        x: [N, D], what the adapted layer reads.
        a: [r, D], of ``x``'s dtype or a wider one; or up to three such matrices of one dtype, of layers that all read
            this x: they share its mask and one reading of it.
        hashes: int32 [N], ``blocks.row_hashes`` of the rows' keys; None for no dropout.
        place: names the layer, or what the layers share, as :func:`keyed_dropout`'s ``column_seed`` does.
        p: probability of dropping, 0 < p < 1 with ``hashes``. The factor 1/(1 − p) belongs into :func:`lora_up`'s.
        remake: ``(kept, make)``: backward keeps the tensors ``kept`` in place of x, and ``make(kept)`` gives x again,
            [..., D].
        implementation: overrides the switch for this call.

    Returns:
        ``(x, P)``: x for the base layer to read, and P [N, r] in float32 (float64 for float64), a list of them for
        several ``a``. Backward adds to the gradient that comes back through that x **in place**, so only operations
        that make fresh ones, such as matrix products, may read it.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or probability.
        RuntimeError: ``triton`` asked for where it cannot run; in backward, ``create_graph=True``.
    """
    weights = [a] if isinstance(a, Tensor) else list(a)
    _check_down(x, weights, hashes, p)
    chosen = resolve(implementation, x)
    downs: Sequence[Tensor]
    if chosen == "eager":
        mask = (0, 0) if hashes is None else mask_arguments(place, p)
        downs = [lora_down_reference(x, weight, hashes, *mask)[1] for weight in weights]
    elif hashes is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Generating comes here for each token, where an op and an autograd function cost more than their work.
        downs = parts_of(_down(x, weights, None, place, p, chosen), [weight.shape[0] for weight in weights])
    else:
        x, *downs = _Down.apply(x, hashes, place, p, remake, chosen, *weights)
    return x, downs[0] if isinstance(a, Tensor) else list(downs)


def lora_up(result: Tensor, down: Tensor, b: Tensor, factor: float, *, implementation: str | None = None) -> Tensor:
    """The second half of a low-rank adapter: ``result`` + f · P Bᵀ, differentiable in ``result``, ``down`` and ``b``.

    Args:
        result: [N, O], the base layer's output, **overwritten** (not in a compiled graph): nobody else may need its
            values.
        down: P [N, r] of :func:`lora_down`.
        b: [O, r], of ``result``'s dtype or a wider one.
        factor: f, the adapter's scaling, over 1 − p where there is dropout.
        implementation: overrides the switch for this call.

    Returns:
        ``result``, rounded once to its dtype.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device.
        RuntimeError: ``triton`` asked for where it cannot run; in backward, ``create_graph=True``.
    """
    _check_up(result, down, b)
    chosen = resolve(implementation, result)
    if chosen == "eager":
        return lora_up_reference(result, down, b, factor)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _add_up_(result, down, b, factor, chosen)
        return result
    return _Up.apply(result, down, b, factor, chosen)


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


def check_weights(a: list[Tensor], width: int, like: Tensor) -> None:
    """``a`` are one to ``MOST_SHARED`` matrices [r, ``width``] of one dtype, on the device of ``like``."""
    if not 0 < len(a) <= MOST_SHARED:
        raise ValueError(f"a: expected one to {MOST_SHARED} matrices, got {len(a)}")
    for index, each in enumerate(a):
        name = "a" if len(a) == 1 else f"a[{index}]"
        _check_matrix(name, each, "r", width)
        checks.check_device(name, each, "x", like)
        if each.dtype != a[0].dtype:
            raise TypeError(f"{name}: expected a[0]'s dtype {a[0].dtype}, got {each.dtype}")


def check_hashes(count: int, x: Tensor, hashes: Tensor | None, p: float) -> None:
    """``hashes`` are those of x's ``count`` rows, beside a probability."""
    if hashes is None:
        return
    if not isinstance(hashes, Tensor) or hashes.dtype != torch.int32:
        raise TypeError(
            "hashes: expected an int32 tensor, got "
            f"{hashes.dtype if isinstance(hashes, Tensor) else type(hashes).__name__}"
        )
    checks.check_device("hashes", hashes, "x", x)
    checks.check_shape("hashes", hashes, [count], "one for each row of x")
    if not 0 < p < 1:
        raise ValueError(f"p: expected 0 < p < 1 with hashes, got {p!r}")


def _check_down(x: Tensor, a: list[Tensor], hashes: Tensor | None, p: float) -> None:
    _check_matrix("x", x, "N", "D")
    check_weights(a, x.shape[1], x)
    check_hashes(x.shape[0], x, hashes, p)


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


def _parts_bytes(device: torch.device, rows: Tensor, weight: Tensor, rank: int) -> int:
    if device.type != "cuda":
        return 0
    return parts_bytes(rows.shape[0], rows.shape[1], rank, rows.dtype, weight.dtype)


def _down_bytes(device: torch.device, x: Tensor, a: list[Tensor], hashes: Tensor | None, *, gradient: bool) -> int:
    rank = sum(each.shape[0] for each in a)
    # Several matrices are copied below each other on the torch path, and their Q beside each other.
    copied = 0 if len(a) == 1 else rank * (x.shape[1] * a[0].element_size() + gradient * 4 * x.shape[0])
    inside = low_rank_chunks.down_scratch(device, x, rank, hashes, gradient=gradient) + copied
    return max(inside, _parts_bytes(device, x, a[0], rank))


@scratch_rule("low_rank_down")
def _(device: torch.device, x: Tensor, a: list[Tensor], hashes: Tensor | None) -> int:
    return _down_bytes(device, x, a, hashes, gradient=False)


@scratch_rule("add_low_rank_gradient_")
def _(device: torch.device, x: Tensor, a: list[Tensor], hashes: Tensor | None) -> int:
    return _down_bytes(device, x, a, hashes, gradient=True)


@scratch_rule("add_low_rank_up_")
def _(device: torch.device, result: Tensor, down: Tensor, b: Tensor) -> int:
    return low_rank_chunks.up_scratch(device, result, down, b)


@scratch_rule("low_rank_up_gradients")
def _(device: torch.device, grad: Tensor, down: Tensor, b: Tensor) -> int:
    return max(low_rank_chunks.up_scratch(device, grad, down, b), _parts_bytes(device, grad, b, b.shape[1]))
