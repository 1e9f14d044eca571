"""``pairwise_cosine``: how far the states of a batch point apart, per layer, without the B×B matrix.

With ĥ_i the state of sequence i at length 1 (a zero state stays zero), s = Σ_i ĥ_i and n = Σ_i ‖ĥ_i‖² (= B without zero
states):

    loss = mean over layers of mean over i ≠ j of 1 − cos(h_i, h_j) = mean over layers of 1 − (‖s‖² − n)/(B(B−1))
    d loss/d h_i = −2/(L·B(B−1)) · (s − ĥ_i(ĥ_i·s)) / ‖h_i‖, 0 for a zero state

Memory above the inputs: forward, s in float32 [L, D] and 1/‖h_i‖ in float32 [L, B]; backward, the gradient that it
returns.

Legend: L layers, B sequences, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .context import Context
from .oracles import pairwise_cosine_reference
from .scratch import scratch_rule
from .selection import resolve


def _forward_torch(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = checks.accumulate_dtype(states.dtype)
    layers, batch, width = states.shape
    similarity = torch.empty(layers, dtype=acc, device=states.device)
    summed = torch.empty((layers, width), dtype=acc, device=states.device)
    inverse = torch.empty((layers, batch), dtype=acc, device=states.device)
    for layer in range(layers):
        h = states[layer].to(acc)
        norm = torch.linalg.vector_norm(h, dim=-1)
        inverse[layer] = torch.where(norm > 0, norm.reciprocal(), 0.0)
        unit = h * inverse[layer, :, None]
        summed[layer] = unit.sum(dim=0)
        similarity[layer] = summed[layer].square().sum() - unit.square().sum()
    return similarity, summed, inverse


def _backward_torch(states: Tensor, summed: Tensor, inverse: Tensor, scale: Tensor) -> Tensor:
    grad = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    for layer in range(states.shape[0]):
        unit = states[layer].to(summed.dtype) * inverse[layer, :, None]
        along = (unit * summed[layer]).sum(dim=-1, keepdim=True)
        grad[layer] = (summed[layer] - unit * along) * (2 * inverse[layer, :, None] * scale[layer])
    return grad


@torch.library.custom_op("repbend_kernels::pairwise_similarity", mutates_args=())
def pairwise_similarity(states: Tensor, implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(Σ over i ≠ j of cos [L], s [L, D], 1/‖h‖ [L, B])``; only the first is differentiable."""
    if implementation == "triton":
        from .triton.pairwise_cosine import launch_forward

        return launch_forward(states)
    return _forward_torch(states)


@pairwise_similarity.register_fake
def _(states: Tensor, implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    layers, batch, width = states.shape
    acc = checks.accumulate_dtype(states.dtype)
    return (
        states.new_empty(layers, dtype=acc),
        states.new_empty((layers, width), dtype=acc),
        states.new_empty((layers, batch), dtype=acc),
    )


@torch.library.custom_op("repbend_kernels::pairwise_similarity_backward", mutates_args=())
def pairwise_similarity_backward(
    states: Tensor, summed: Tensor, inverse: Tensor, scale: Tensor, implementation: str
) -> Tensor:
    """``scale`` [L] times the gradient of each layer's similarity, [L, B, D]."""
    if implementation == "triton":
        from .triton.pairwise_cosine import launch_backward

        return launch_backward(states, summed, inverse, scale)
    return _backward_torch(states, summed, inverse, scale)


@pairwise_similarity_backward.register_fake
def _(states: Tensor, summed: Tensor, inverse: Tensor, scale: Tensor, implementation: str) -> Tensor:
    return states.new_empty(states.shape)


def _setup(ctx: Context, inputs: tuple[Tensor, str], output: tuple[Tensor, Tensor, Tensor]) -> None:
    states, ctx.implementation = inputs
    _, summed, inverse = output
    ctx.mark_non_differentiable(summed, inverse)
    ctx.save_for_backward(states, summed, inverse)


def _backward(ctx: Context, grad: Tensor, _summed: None, _inverse: None) -> tuple[Tensor, None]:
    states, summed, inverse = ctx.saved_tensors
    return pairwise_similarity_backward(states, summed, inverse, grad, ctx.implementation), None


pairwise_similarity.register_autograd(_backward, setup_context=_setup)


def pairwise_cosine(states: Tensor | Sequence[Tensor], *, implementation: str | None = None) -> Tensor:
    """Mean over layers of the mean over pairs i ≠ j of ``1 − cos(h_i, h_j)``, differentiable in ``states``.

    Args:
        states: [L, B, D], or L tensors [B, D] (stacked here: L·B·D elements), one state per sequence.
        implementation: overrides the switch for this call.

    Returns:
        float32 scalar (float64 for float64), between 0 and B/(B−1).

    Raises:
        ValueError, TypeError: fewer than two sequences, no layer, wrong shape or dtype.
        RuntimeError: ``triton`` asked for where it cannot run.
    """
    stacked = states if isinstance(states, Tensor) else _stack(list(states))
    checks.check_float("states", stacked)
    if stacked.dim() != 3 or stacked.shape[0] < 1 or stacked.shape[2] < 1:
        raise ValueError(f"states: expected shape [layers, B, D], got {list(stacked.shape)}")
    batch = stacked.shape[1]
    if batch < 2:
        raise ValueError(f"states: expected at least two sequences to form pairs, got {batch}")
    chosen = resolve(implementation, stacked)
    if chosen == "eager":
        return pairwise_cosine_reference(stacked)
    similarity, _, _ = pairwise_similarity(stacked, chosen)
    return 1 - similarity.mean() / (batch * (batch - 1))


def _stack(states: list[Tensor]) -> Tensor:
    if not states:
        raise ValueError("states: expected at least one layer, got none")
    for index, state in enumerate(states):
        checks.check_like(f"states[{index}]", state, "states[0]", states[0])
        if state.dim() != 2:
            raise ValueError(f"states[{index}]: expected shape [B, D], got {list(state.shape)}")
        checks.check_shape(f"states[{index}]", state, states[0].shape, "as states[0]")
    return torch.stack(states)


@scratch_rule("pairwise_similarity")
def _(device: torch.device, states: Tensor) -> int:
    # Of one layer: the states in float32, at length 1, and these squared.
    return 3 * 4 * states[0].numel()


@scratch_rule("pairwise_similarity_backward")
def _(device: torch.device, states: Tensor) -> int:
    # Of one layer: the states in float32 and at length 1, their products with the sum, and the difference.
    return 4 * 4 * states[0].numel()
