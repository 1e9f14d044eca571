"""``bend_distance``: the distance as an ordinary loss, for trainers that do not tap; and the op behind
``window_distance``.

    forward   d_row = distance(h_row, r_row) for each layer           (see ``row_distance``)
    backward  grad_hidden = grad_row · d d_row/d h, recomputed from hidden and reference

Memory above the inputs: forward, per-row scalars; backward, the gradients that it returns. The torch path adds a
scratch of a few MiB that does not grow with the tensors.

Legend: L layers, N rows of hidden, R selected rows, D width.
"""

import torch
from torch import Tensor

from . import checks, consumed
from .context import Context, Gradients
from .oracles import bend_distance_reference
from .row_distance import distances_torch, gradient_torch
from .rows import count_rows
from .scratch import in_blocks, largest, scratch_rule
from .selection import resolve


@torch.library.custom_op("repbend_kernels::row_distance", mutates_args=())
def row_distance(
    hiddens: list[Tensor],
    references: list[Tensor],
    rows: Tensor | None,
    mask: Tensor | None,
    kind: str,
    implementation: str,
) -> Tensor:
    """Distances [L, R] of each layer's rows; 0 where ``mask`` is False."""
    if implementation == "triton":
        from .triton.row_distance import launch_distances

        return launch_distances(hiddens, references, rows, mask, kind)
    return torch.stack([distances_torch(h, r, rows, mask, kind) for h, r in zip(hiddens, references)])


@row_distance.register_fake
def _(
    hiddens: list[Tensor],
    references: list[Tensor],
    rows: Tensor | None,
    mask: Tensor | None,
    kind: str,
    implementation: str,
) -> Tensor:
    first = hiddens[0]
    count = count_rows(first) if rows is None else rows.shape[0]
    return first.new_empty((len(hiddens), count), dtype=checks.accumulate_dtype(first.dtype))


@torch.library.custom_op("repbend_kernels::row_distance_backward", mutates_args=())
def row_distance_backward(
    hidden: Tensor,
    reference: Tensor,
    rows: Tensor | None,
    mask: Tensor | None,
    kind: str,
    grad_rows: Tensor,
    implementation: str,
) -> Tensor:
    """``grad_rows`` [R] times the direction, as a new tensor of ``hidden``'s shape."""
    if implementation == "triton":
        from .triton.row_distance import launch_gradient

        return launch_gradient(hidden, reference, rows, mask, kind, grad_rows)
    return gradient_torch(hidden, reference, rows, mask, kind, grad_rows)


@row_distance_backward.register_fake
def _(
    hidden: Tensor,
    reference: Tensor,
    rows: Tensor | None,
    mask: Tensor | None,
    kind: str,
    grad_rows: Tensor,
    implementation: str,
) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _setup(
    ctx: Context, inputs: tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None, str, str], output: Tensor
) -> None:
    hiddens, references, rows, mask, ctx.kind, ctx.implementation = inputs
    ctx.layers = len(hiddens)
    ctx.save_for_backward(*hiddens, *references, rows, mask)


def _backward(ctx: Context, grad: Tensor) -> Gradients:
    saved = ctx.saved_tensors
    hiddens, references, (rows, mask) = saved[: ctx.layers], saved[ctx.layers : 2 * ctx.layers], saved[-2:]
    grads = [
        row_distance_backward(h, r, rows, mask, ctx.kind, grad[layer], ctx.implementation) if needed else None
        for layer, (h, r, needed) in enumerate(zip(hiddens, references, ctx.needs_input_grad[0]))
    ]
    return grads, [None] * ctx.layers, None, None, None, None


row_distance.register_autograd(_backward, setup_context=_setup)


def bend_distance(
    hidden: Tensor,
    reference: Tensor,
    rows: Tensor | None = None,
    *,
    kind: str = "l2",
    reduction: str = "mean",
    implementation: str | None = None,
) -> Tensor:
    """Mean or sum over rows of the distance between hidden and reference states, differentiable in ``hidden``.

    Args:
        hidden: [..., D], any strides.
        reference: of ``hidden``'s shape where ``rows`` is None, else [R, D]; or [1, D] for every row. Kept as it is.
        rows: int64 [R], unique indices into ``hidden.reshape(-1, D)``; None for all rows.
        kind: ``l2``, ``cosine``, ``relu_cosine`` or ``mse``.
        reduction: ``mean`` over rows or ``sum``; no rows give 0.
        implementation: overrides the switch for this call.

    Returns:
        float32 scalar (float64 for float64).

    Raises:
        ValueError, TypeError: wrong shape, dtype, device, kind or reduction, or a reference that requires grad.
        IndexError: in debug mode, rows out of range.
        RuntimeError: ``triton`` asked for where it cannot run; a reference that holds the directions of an earlier
            call.
    """
    checks.check_choice("kind", kind, checks.KINDS)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_states("hidden", hidden)
    checks.check_like("reference", reference, "hidden", hidden)
    checks.check_constant("reference", reference)
    consumed.check_references("reference", reference)
    width = hidden.shape[-1]
    if rows is None:
        shape, meaning = list(hidden.shape), "as hidden"
    else:
        checks.check_indices("rows", rows, count_rows(hidden), "hidden", hidden)
        checks.check_unique("rows", rows)
        shape, meaning = [rows.shape[0], width], "one row per index in rows"
    if list(reference.shape) != [1, width]:
        checks.check_shape("reference", reference, shape, f"{meaning}; or [1, {width}] for every row")
    chosen = resolve(implementation, hidden)
    if chosen == "eager":
        return bend_distance_reference(hidden, reference, rows, kind, reduction)
    distances = row_distance([hidden], [reference], rows, None, kind, chosen)
    total = distances.sum()
    return total / max(distances.numel(), 1) if reduction == "mean" else total


@scratch_rule("row_distance")
def _(device: torch.device, hiddens: list[Tensor]) -> int:
    return in_blocks(device, 4, largest(*hiddens))


@scratch_rule("row_distance_backward")
def _(device: torch.device, hidden: Tensor) -> int:
    return in_blocks(device, 4, hidden.numel())
