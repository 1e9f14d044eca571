"""``window_distance``: mean distance over a window of layers and a token mask, in one call.

    loss = Σ over layers, masked tokens of d(h, r) / (layers × masked tokens)

It takes the tuples of ``output_hidden_states=True`` as they come: nothing is stacked, multiplied by the mask, or cast
to float32 in memory. Memory above the inputs: forward, per-row scalars (float32 [L, N]); backward, one gradient per
layer, which is what it returns. With ``consume_references`` the references' own memory becomes those gradients, so that
nothing is added at all.

Legend: L layers, B sequences, T tokens, N = B·T rows, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, consumed
from .bend_distance import row_distance
from .context import Context, Gradients
from .oracles import window_distance_reference
from .row_distance import distances_into_direction_torch
from .rows import count_rows, scale_into
from .scratch import in_blocks, largest, scratch_rule
from .selection import resolve


@torch.library.custom_op("repbend_kernels::row_distance_consume", mutates_args=("references",))
def row_distance_consume(
    hiddens: list[Tensor], references: list[Tensor], mask: Tensor | None, kind: str, implementation: str
) -> Tensor:
    """Distances [L, N]; each reference is overwritten with the direction d distance/d hidden."""
    if implementation == "triton":
        from .triton.row_distance import launch_consume

        return launch_consume(hiddens, references, mask, kind)
    return torch.stack([distances_into_direction_torch(h, r, None, mask, kind, r) for h, r in zip(hiddens, references)])


@row_distance_consume.register_fake
def _(hiddens: list[Tensor], references: list[Tensor], mask: Tensor | None, kind: str, implementation: str) -> Tensor:
    first = hiddens[0]
    return first.new_empty((len(hiddens), count_rows(first)), dtype=checks.accumulate_dtype(first.dtype))


@torch.library.custom_op("repbend_kernels::scale_", mutates_args=("tensors",))
def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply each tensor in place by the scalar ``factor`` (float32, applied before rounding to the
    tensor's dtype).
    """
    for tensor in tensors:
        scale_into(tensor, tensor, factor)


@scale_.register_fake
def _(tensors: list[Tensor], factor: Tensor) -> None:
    return None


class _Consume(torch.autograd.Function):
    """Sum of distances whose gradient lives in the references' memory; one backward only."""

    @staticmethod
    def forward(
        ctx: Context, kind: str, implementation: str, mask: Tensor | None, layers: int, *tensors: Tensor
    ) -> Tensor:
        hiddens, references = list(tensors[:layers]), list(tensors[layers:])
        consumed.check_apart("references", references, hiddens, "hiddens")
        consumed.drop_stale_notes(references)
        distances = row_distance_consume(hiddens, references, mask, kind, implementation)
        consumed.note_directions(references)
        ctx.save_for_backward(*references)
        return distances.sum()

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        # A second backward finds a newer version of these tensors, and autograd refuses it.
        checks.check_first_derivative("window_distance(consume_references=True)")
        directions = list(ctx.saved_tensors)
        consumed.drop_stale_notes(directions)
        scale_(directions, grad)
        consumed.note_directions(directions)
        return None, None, None, None, *directions, *([None] * len(directions))


def window_distance(
    hiddens: Sequence[Tensor],
    references: Sequence[Tensor],
    mask: Tensor | None,
    *,
    kind: str = "l2",
    reduction: str = "mean",
    consume_references: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Distance between two stacks of hidden states over layers and masked tokens, differentiable in ``hiddens``.

    Args:
        hiddens: L tensors [B, T, D] (any leading dimensions), the window of a model's ``hidden_states``.
        references: L tensors of the same shape, dtype and device, no gradient.
        mask: bool, the shape of a layer without D; None for all tokens. Values at masked-out tokens never matter, even
            NaN.
        kind: ``l2``, ``cosine``, ``relu_cosine`` or ``mse``.
        reduction: ``mean`` (sum / (masked tokens × L)) or ``sum``; no masked token gives 0.
        consume_references: let the references' memory become the gradients. They hold no reference afterwards, and
            backward runs once; they have to be contiguous and not used elsewhere.
        implementation: overrides the switch for this call.

    Returns:
        float32 scalar (float64 for float64).

    Raises:
        ValueError, TypeError: wrong count, shape, dtype, device, kind or reduction, or a reference that requires grad.
        RuntimeError: ``triton`` asked for where it cannot run; references that hold the directions of an earlier call
            or, to be consumed, share memory; in backward after consuming, ``create_graph=True``.
    """
    hiddens, references = list(hiddens), list(references)
    _check(hiddens, references, mask, kind, reduction)
    chosen = resolve(implementation, hiddens[0])
    if chosen == "eager":
        return window_distance_reference(hiddens, references, mask, kind, reduction)
    if consume_references and torch.is_grad_enabled() and any(h.requires_grad for h in hiddens):
        for index, reference in enumerate(references):
            if not reference.is_contiguous():
                raise ValueError(
                    f"references[{index}]: expected a contiguous tensor to consume, got strides "
                    f"{list(reference.stride())}"
                )
        total = _Consume.apply(kind, chosen, mask, len(hiddens), *hiddens, *references)
    else:
        total = row_distance(hiddens, references, None, mask, kind, chosen).sum()
    if reduction == "sum":
        return total
    if mask is None:
        return total / max(count_rows(hiddens[0]) * len(hiddens), 1)
    return total / (mask.sum().clamp(min=1) * len(hiddens))


def _check(hiddens: list[Tensor], references: list[Tensor], mask: Tensor | None, kind: str, reduction: str) -> None:
    checks.check_choice("kind", kind, checks.KINDS)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    if not hiddens:
        raise ValueError("hiddens: expected at least one layer, got none")
    if len(references) != len(hiddens):
        raise ValueError(f"references: expected {len(hiddens)} layers as hiddens has, got {len(references)}")
    first = hiddens[0]
    for index, (hidden, reference) in enumerate(zip(hiddens, references)):
        checks.check_states(f"hiddens[{index}]", hidden)
        checks.check_like(f"hiddens[{index}]", hidden, "hiddens[0]", first)
        checks.check_shape(f"hiddens[{index}]", hidden, first.shape, "as hiddens[0]")
        checks.check_like(f"references[{index}]", reference, f"hiddens[{index}]", hidden)
        checks.check_shape(f"references[{index}]", reference, hidden.shape, f"as hiddens[{index}]")
        checks.check_constant(f"references[{index}]", reference)
        consumed.check_references(f"references[{index}]", reference)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {mask.dtype}")
        checks.check_shape("mask", mask, first.shape[:-1], "hiddens[0] without its last dimension")
        checks.check_device("mask", mask, "hiddens[0]", first)


@scratch_rule("row_distance_consume")
def _(device: torch.device, hiddens: list[Tensor]) -> int:
    return in_blocks(device, 4, largest(*hiddens))


@scratch_rule("scale_")
def _(device: torch.device, tensors: list[Tensor]) -> int:
    return in_blocks(device, 2, largest(*tensors))
