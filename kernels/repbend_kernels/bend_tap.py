"""``bend_tap``: read a distance at a place of the residual stream and put its gradient in there.

    forward   loss = Σ over rows of d(h_row, r_row);  the rows' buffer becomes g = d d/d h       (see ``row_distance``)
    backward  grad_hidden = grad_out + grad_loss · g at the rows
    limit c   d_row = min(d(h_row, r_row), c·‖r_row‖₂), and g_row = 0 where that is the second

Memory above the inputs: forward, per-row scalars (float32 [R], on Triton also int32 [N]); backward, the gradient that
it returns. The torch path adds a scratch of a few MiB that does not grow with the tensors. A [1, D] reference, which
has no room for R directions, costs one [R, D] buffer. A limit costs one more pass over the directions.

Legend: N rows of hidden, R selected rows, D width.
"""

import torch
from torch import Tensor

from . import checks, consumed
from .bend_distance import row_distance
from .context import Context, Gradients
from .oracles import bend_tap_reference
from .row_distance import add_rows_torch, distances_into_direction_torch
from .rows import copied_bytes, count_rows
from .scratch import in_blocks, largest, scratch_rule
from .selection import resolve


@torch.library.custom_op("repbend_kernels::bend_tap_forward", mutates_args=("buffer",))
def bend_tap_forward(
    hidden: Tensor, buffer: Tensor, broadcast: Tensor | None, rows: Tensor, kind: str, implementation: str
) -> tuple[Tensor, Tensor]:
    """``(distances [R], place)``; ``buffer`` [R, D] holds the references, or ``broadcast`` [1, D] does, and receives
    the directions.

    ``place`` (int32 [N], Triton only) tells the backward kernel which selected row, if any, lies at a row of hidden.
    """
    if implementation == "triton":
        from .triton.row_distance import launch_tap_forward

        return launch_tap_forward(hidden, buffer, broadcast, rows, kind)
    reference = buffer if broadcast is None else broadcast
    distances = distances_into_direction_torch(hidden, reference, rows, None, kind, buffer)
    return distances, torch.empty(0, dtype=torch.int32, device=hidden.device)


@bend_tap_forward.register_fake
def _(
    hidden: Tensor, buffer: Tensor, broadcast: Tensor | None, rows: Tensor, kind: str, implementation: str
) -> tuple[Tensor, Tensor]:
    distances = hidden.new_empty(rows.shape[0], dtype=checks.accumulate_dtype(hidden.dtype))
    return distances, hidden.new_empty(count_rows(hidden) if implementation == "triton" else 0, dtype=torch.int32)


@torch.library.custom_op("repbend_kernels::bend_tap_backward", mutates_args=())
def bend_tap_backward(
    grad: Tensor | None,
    direction: Tensor,
    rows: Tensor,
    place: Tensor,
    scale: Tensor,
    shape: list[int],
    implementation: str,
) -> Tensor:
    """New tensor of ``shape``: ``grad`` (zeros where None) + ``scale`` · ``direction`` [R, D] at ``rows``."""
    if implementation == "triton":
        from .triton.row_distance import launch_tap_backward

        return launch_tap_backward(grad, direction, rows, place, scale, shape)
    return add_rows_torch(grad, direction, rows, scale, shape)


@bend_tap_backward.register_fake
def _(
    grad: Tensor | None,
    direction: Tensor,
    rows: Tensor,
    place: Tensor,
    scale: Tensor,
    shape: list[int],
    implementation: str,
) -> Tensor:
    return direction.new_empty(shape)


class _BendTap(torch.autograd.Function):
    """Identity on ``hidden`` with a second output; an op may not return its own input, hence a Function
    over two ops.
    """

    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        reference_rows: Tensor,
        rows: Tensor,
        kind: str,
        implementation: str,
        limit: float | None,
    ) -> tuple[Tensor, Tensor]:
        broadcast = reference_rows if reference_rows.shape[0] == 1 else None
        buffer = reference_rows if broadcast is None else reference_rows.new_empty(rows.shape[0], hidden.shape[-1])
        farthest = None if limit is None else _farthest(reference_rows, limit)
        if broadcast is None:
            consumed.check_apart("reference_rows", [buffer], [hidden], "hidden")
            consumed.drop_stale_notes([buffer])
        distances, place = bend_tap_forward(hidden, buffer, broadcast, rows, kind, implementation)
        if farthest is not None:
            buffer.mul_((distances < farthest).to(buffer.dtype)[:, None])
            distances = torch.minimum(distances, farthest)
        if broadcast is None:
            consumed.note_directions([buffer])
        ctx.save_for_backward(buffer, rows, place)
        ctx.shape, ctx.implementation = list(hidden.shape), implementation
        ctx.set_materialize_grads(False)
        return hidden.view_as(hidden), distances.sum()

    @staticmethod
    def backward(ctx: Context, grad_hidden: Tensor | None, grad_loss: Tensor | None) -> Gradients:
        if grad_loss is None:
            return grad_hidden, None, None, None, None, None
        checks.check_first_derivative("bend_tap")
        direction, rows, place = ctx.saved_tensors
        grad = bend_tap_backward(grad_hidden, direction, rows, place, grad_loss, ctx.shape, ctx.implementation)
        return grad, None, None, None, None, None


def bend_tap(
    hidden: Tensor,
    reference_rows: Tensor,
    rows: Tensor,
    *,
    kind: str = "l2",
    limit: float | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Distance of selected rows of the residual stream to their references, with its gradient put in at this place.

    Args:
        hidden: [..., D], typically [batch, tokens, D]; any strides.
        reference_rows: [R, D], contiguous, dtype and device of ``hidden``, no gradient. **Overwritten** with the
            direction d distance/d hidden where a gradient is wanted (``hidden`` requires grad and grad mode is on),
            else left alone. A [1, D] reference serves every row and is never overwritten.
        rows: int64 [R], unique indices into ``hidden.reshape(-1, D)``. Out of range: an error in debug mode
            (:func:`set_debug`) and on the CPU; NaN in the loss on the GPU.
        kind: ``l2``, ``cosine``, ``relu_cosine`` or ``mse``.
        limit: above 0, ``l2`` only: a row at ``limit`` times its reference's norm or farther counts as that far and has
            no gradient, which bounds a distance that is maximised.
        implementation: overrides the switch for this call.

    Returns:
        ``(hidden, loss)``: the same values as ``hidden``, to be used in its place, and the **sum** over rows of the
        distance, a float32 scalar (float64 for float64). Multiply ``loss`` by its weight; the factor reaches the rows
        in backward. In float16, ``mse`` directions below 6e-8 round to 0.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device, kind or limit, or a reference that requires grad.
        IndexError: in debug mode, rows out of range.
        RuntimeError: ``triton`` asked for where it cannot run; ``reference_rows`` that hold the directions of an
            earlier call, or share memory with ``hidden``; in backward, ``create_graph=True``.
    """
    checks.check_choice("kind", kind, checks.KINDS)
    checks.check_states("hidden", hidden)
    checks.check_indices("rows", rows, count_rows(hidden), "hidden", hidden)
    checks.check_unique("rows", rows)
    check_reference_rows(reference_rows, hidden, rows.shape[0])
    if limit is not None and (kind != "l2" or not limit > 0):
        raise ValueError(f"limit: expected a number above 0 with kind='l2', got {limit} with kind={kind!r}")
    consumed.check_references("reference_rows", reference_rows)
    chosen = resolve(implementation, hidden)
    if chosen == "eager":
        return bend_tap_reference(hidden, reference_rows, rows, kind, limit)
    if not (hidden.requires_grad and torch.is_grad_enabled()):
        distances = row_distance([hidden], [reference_rows], rows, None, kind, chosen)
        if limit is not None:
            distances = torch.minimum(distances, _farthest(reference_rows, limit))
        return hidden, distances.sum()
    hidden, loss = _BendTap.apply(hidden, reference_rows, rows, kind, chosen, limit)
    return hidden, loss


def _farthest(reference_rows: Tensor, limit: float) -> Tensor:
    """``limit`` times each reference's norm, [R] or [1], in the distances' dtype."""
    return limit * torch.linalg.vector_norm(reference_rows, dim=-1, dtype=checks.accumulate_dtype(reference_rows.dtype))


def check_reference_rows(reference_rows: Tensor, hidden: Tensor, count: int) -> None:
    """``reference_rows`` is [R, D] or [1, D], contiguous, without gradient, like ``hidden``."""
    checks.check_like("reference_rows", reference_rows, "hidden", hidden)
    checks.check_constant("reference_rows", reference_rows)
    width = hidden.shape[-1]
    if list(reference_rows.shape) not in ([count, width], [1, width]):
        raise ValueError(
            f"reference_rows: expected shape [{count}, {width}] (one row per index in rows) or [1, {width}], "
            f"got {list(reference_rows.shape)}"
        )
    if not reference_rows.is_contiguous():
        raise ValueError(f"reference_rows: expected a contiguous tensor, got strides {list(reference_rows.stride())}")


@scratch_rule("bend_tap_forward")
def _(device: torch.device, hidden: Tensor, buffer: Tensor) -> int:
    return in_blocks(device, 4, largest(hidden, buffer)) + copied_bytes(hidden)


@scratch_rule("bend_tap_backward")
def _(device: torch.device, grad: Tensor | None, direction: Tensor) -> int:
    return in_blocks(device, 4, largest(grad, direction)) + copied_bytes(grad)
