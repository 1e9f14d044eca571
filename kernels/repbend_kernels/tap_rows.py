"""``tap_rows``: a differentiable copy of some rows of the residual stream, whose gradient joins the stream in one pass.

    forward   copy = hidden[rows]
    backward  grad_hidden = grad_out + grad_copy at the rows

Indexing would make a zero tensor of hidden's size in backward and add it to the other branch's gradient.
Memory above the inputs: forward, the copy [R, D], on Triton also int32 [N]; backward, the gradient that it returns.

Legend: R selected rows, D width.
"""

import math

import torch
from torch import Tensor

from . import checks
from .context import Context, Gradients
from .oracles import tap_rows_reference
from .row_distance import add_rows_torch
from .rows import copied_bytes, count_rows, gather
from .scratch import in_blocks, largest, scratch_rule
from .selection import resolve


@torch.library.custom_op("repbend_kernels::gather_rows", mutates_args=())
def gather_rows(hidden: Tensor, rows: Tensor, implementation: str, placed: bool) -> tuple[Tensor, Tensor]:
    """``(new tensor [R, D], place)``.

    ``place`` (int32 [N], Triton and ``placed`` only) tells the backward kernel which selected row, if any, lies at a
    row of hidden.
    """
    if implementation == "triton":
        from .triton.tap_rows import launch_gather

        return launch_gather(hidden, rows, placed=placed)
    return gather(hidden, rows).contiguous(), torch.empty(0, dtype=torch.int32, device=hidden.device)


@gather_rows.register_fake
def _(hidden: Tensor, rows: Tensor, implementation: str, placed: bool) -> tuple[Tensor, Tensor]:
    count = count_rows(hidden) if placed and implementation == "triton" else 0
    return hidden.new_empty((rows.shape[0], hidden.shape[-1])), hidden.new_empty(count, dtype=torch.int32)


@torch.library.custom_op("repbend_kernels::add_rows", mutates_args=())
def add_rows(
    grad: Tensor | None, addend: Tensor, rows: Tensor, place: Tensor, shape: list[int], implementation: str
) -> Tensor:
    """New tensor of ``shape``: ``grad`` (zeros where None) plus ``addend`` [R, D] at ``rows``, in one pass where
    ``place`` has its N elements.
    """
    if implementation == "triton" and place.numel() == math.prod(shape[:-1]):
        from .triton.row_distance import launch_tap_backward

        return launch_tap_backward(grad, addend.contiguous(), rows, place, None, shape)
    return add_rows_torch(grad, addend, rows, None, shape)


@add_rows.register_fake
def _(
    grad: Tensor | None, addend: Tensor, rows: Tensor, place: Tensor, shape: list[int], implementation: str
) -> Tensor:
    return addend.new_empty(shape)


def _setup_gather(ctx: Context, inputs: tuple[Tensor, Tensor, str, bool], output: tuple[Tensor, Tensor]) -> None:
    hidden, rows, ctx.implementation, _ = inputs
    ctx.shape = list(hidden.shape)
    ctx.save_for_backward(rows, output[1])


def _backward_gather(ctx: Context, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None]:
    rows, place = ctx.saved_tensors
    return add_rows(None, grad, rows, place, ctx.shape, ctx.implementation), None, None, None


def _setup_add(
    ctx: Context, inputs: tuple[Tensor | None, Tensor, Tensor, Tensor, list[int], str], output: Tensor
) -> None:
    grad, _, rows, _, _, ctx.implementation = inputs
    ctx.has_grad = grad is not None
    ctx.save_for_backward(rows)


def _backward_add(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None, None]:
    (rows,) = ctx.saved_tensors
    copy, _ = gather_rows(grad, rows, ctx.implementation, True)
    return grad if ctx.has_grad else None, copy, None, None, None, None


# Each is the other's derivative, which is what a second backward through a tap asks for.
gather_rows.register_autograd(_backward_gather, setup_context=_setup_gather)
add_rows.register_autograd(_backward_add, setup_context=_setup_add)


class _TapRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, hidden: Tensor, rows: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
        copy, place = gather_rows(hidden, rows, implementation, True)
        ctx.save_for_backward(rows, place)
        ctx.shape, ctx.implementation = list(hidden.shape), implementation
        ctx.set_materialize_grads(False)
        return hidden.view_as(hidden), copy

    @staticmethod
    def backward(ctx: Context, grad_hidden: Tensor | None, grad_copy: Tensor | None) -> Gradients:
        if grad_copy is None:
            return grad_hidden, None, None
        rows, place = ctx.saved_tensors
        return add_rows(grad_hidden, grad_copy, rows, place, ctx.shape, ctx.implementation), None, None


def tap_rows(hidden: Tensor, rows: Tensor, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """Copy some rows of the residual stream.

    Args:
        hidden: [..., D], any strides.
        rows: int64 [R], unique indices into ``hidden.reshape(-1, D)``.
        implementation: overrides the switch for this call.

    Returns:
        ``(hidden, copy)``: the same values as ``hidden``, to be used in its place, and [R, D], both differentiable.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device.
        IndexError: in debug mode, rows out of range.
        RuntimeError: ``triton`` asked for where it cannot run.
    """
    checks.check_states("hidden", hidden)
    checks.check_indices("rows", rows, count_rows(hidden), "hidden", hidden)
    checks.check_unique("rows", rows)
    chosen = resolve(implementation, hidden)
    if chosen == "eager":
        return tap_rows_reference(hidden, rows)
    if not (hidden.requires_grad and torch.is_grad_enabled()):
        return hidden, gather_rows(hidden, rows, chosen, False)[0]
    hidden, copy = _TapRows.apply(hidden, rows, chosen)
    return hidden, copy


@scratch_rule("gather_rows")
def _(device: torch.device, hidden: Tensor, rows: Tensor) -> int:
    # Rows that no view finds are found by one index for each leading dimension, and by what is left of the row's
    # number.
    return 0 if hidden.is_contiguous() else max(8 * (hidden.dim() + 1) * rows.numel(), copied_bytes(hidden))


@scratch_rule("add_rows")
def _(device: torch.device, grad: Tensor | None, addend: Tensor) -> int:
    copied = 0 if addend.is_contiguous() else addend.numel() * addend.element_size()
    return in_blocks(device, 4, largest(grad, addend)) + copied_bytes(grad) + copied
