"""``linear_log_prob``: log-probabilities of given tokens, from hidden states and the head, in row chunks.

With z = h·Wᵀ + b, capped to c·tanh(z/c) where there is a soft-cap, q = softmax(z/T), t the row's target:

    out_n          = log q_t
    d out_n/d z_v  = ([v = t] − q_v) / T · (1 − (z_v/c)²)

A row's gradient is the incoming factor of that row times a vector that depends on the row alone, so forward makes that
vector while the logits are there, and backward only scales it: two GEMMs in all. Per chunk: one GEMM with float32
output, one kernel that reads the logits twice and leaves the gradient in place, one GEMM back. Memory above the inputs:
one (chunk × V) float32 buffer, per-row scalars, and the gradient of ``hidden`` (float32 where ``hidden`` is float16,
whose range would lose it; backward returns a scaled copy).

Legend: N rows of hidden, R selected rows (R = N where ``rows`` is None), n rows of a chunk, H width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .context import Context, Gradients
from .head import (
    autocast_operands,
    check_head,
    default_chunk_rows,
    head_chunks,
    head_scratch,
    hidden_rows,
    largest_chunk,
    log_softmax_,
    logit_buffers,
    logits_into,
    scaled_gradient,
    store_gradient,
    stored_gradient_dtype,
)
from .oracles import linear_log_prob_reference
from .rows import blocks
from .scratch import scratch_rule
from .selection import resolve


def _chunk_torch(logits: Tensor, targets: Tensor, temperature: float, softcap: float | None, need_grad: bool) -> Tensor:
    """Log-probabilities [n]; ``logits`` [n, V] receives d out/d z. The scratch is a few rows at a time."""
    out = torch.empty(logits.shape[0], dtype=logits.dtype, device=logits.device)
    for start, stop in blocks(logits.shape[0], logits.shape[1], logits.device):
        z, target = logits[start:stop], targets[start:stop, None]
        softmax, slope = log_softmax_(z, softcap, temperature)
        out[start:stop] = z.gather(1, target).squeeze(1)
        if need_grad:
            torch.mul(softmax, -1 / temperature, out=z)
            z.scatter_add_(1, target, torch.full_like(target, 1 / temperature, dtype=z.dtype))
            if slope is not None:
                z.mul_(slope)
    return out


@torch.library.custom_op("repbend_kernels::linear_log_prob", mutates_args=())
def linear_log_prob_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    chunk_rows: int,
    need_grad: bool,
    implementation: str,
    rows: Tensor | None,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """``(log-probabilities [R], their gradients [R, H])``, the gradients [0, H] where none are needed."""
    acc = checks.accumulate_dtype(hidden.dtype)
    count = targets.shape[0]
    ignored = None if ignore_index is None else targets == ignore_index
    if ignored is not None:
        targets = targets.masked_fill(ignored, 0)
    out = torch.empty(count, dtype=acc, device=hidden.device)
    grad = torch.empty(
        (count if need_grad else 0, hidden.shape[1]), dtype=stored_gradient_dtype(hidden.dtype), device=hidden.device
    )
    chunks = head_chunks(count, chunk_rows, hidden.device)
    (buffer,) = logit_buffers(1, largest_chunk(chunks), weight.shape[0], acc, hidden.device)
    with checks.in_own_dtypes(hidden.device):
        for start, stop in chunks:
            logits = buffer[: stop - start]
            logits_into(logits, hidden_rows(hidden, rows, start, stop), weight, bias)
            if implementation == "triton":
                from .triton.linear_log_prob import launch_chunk

                grad_logits = launch_chunk(
                    logits, targets[start:stop], out[start:stop], temperature, softcap, need_grad, hidden.dtype
                )
            else:
                out[start:stop] = _chunk_torch(logits, targets[start:stop], temperature, softcap, need_grad)
                grad_logits = logits
            if need_grad:
                store_gradient(grad[start:stop], grad_logits, weight, acc, 1 / temperature)
    if ignored is not None:
        # Filled, not multiplied: a row that nobody looks at may hold NaN.
        out.masked_fill_(ignored, 0.0)
        if need_grad:
            grad.masked_fill_(ignored[:, None], 0.0)
    return out, grad


@linear_log_prob_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    chunk_rows: int,
    need_grad: bool,
    implementation: str,
    rows: Tensor | None,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    out = hidden.new_empty(targets.shape[0], dtype=checks.accumulate_dtype(hidden.dtype))
    return out, hidden.new_empty(
        (targets.shape[0] if need_grad else 0, hidden.shape[1]), dtype=stored_gradient_dtype(hidden.dtype)
    )


def _setup(
    ctx: Context, inputs: tuple[Tensor, *tuple[object, ...], Tensor | None, object], output: tuple[Tensor, Tensor]
) -> None:
    ctx.dtype, ctx.count = inputs[0].dtype, inputs[0].shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[-2])


def _backward(ctx: Context, grad_out: Tensor, _grad: None) -> Gradients:
    checks.check_first_derivative("linear_log_prob")
    grad, rows = ctx.saved_tensors
    return scaled_gradient(grad, grad_out[:, None], rows, ctx.count, ctx.dtype), *[None] * 10


linear_log_prob_op.register_autograd(_backward, setup_context=_setup)


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    ignore_index: int | None = -100,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    lengths: Sequence[int] | None = None,
    chunk_rows: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Log-probability of each row's target token, or of each sequence of rows, differentiable in ``hidden`` alone.

    Args:
        hidden: [N, H], the states that predict the targets; pass only the rows that count, or name them in ``rows``.
        weight: [V, H], the head, frozen.
        targets: int64 [R], the token id for each row; R = N where ``rows`` is None. Out of range: an error in debug
            mode (:func:`set_debug`) and on the CPU; NaN on the GPU.
        rows: int64 [R], unique indices into ``hidden``; None for all rows. They are read chunk by chunk, never copied
            whole.
        ignore_index: a target that does not count: its row has log-probability 0 and no gradient, exactly. None for no
            such target.
        bias: [V] or None; a word at −inf has log-probability −inf and no share in the others'. With a soft-cap c, −inf
            is a logit of −c.
        temperature: T > 0.
        softcap: c > 0 of ``c·tanh(z/c)`` (Gemma-2); None for no cap.
        lengths: rows of each sequence, in order, summing to R; then the result is the sum over each sequence.
        chunk_rows: rows per chunk; None for the size rule (``head.default_chunk_rows``).
        implementation: overrides the switch for this call.

    Returns:
        float32 (float64 for float64) [R], or [sequences] with ``lengths``.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or lengths; a weight or bias that requires grad.
        IndexError: in debug mode, targets or rows out of range.
        RuntimeError: ``triton`` asked for where it cannot run; in backward, ``create_graph=True``.
    """
    count = check_head(hidden, rows, weight, bias, softcap, temperature, chunk_rows)
    meaning = "rows of hidden" if rows is None else "one target per index in rows"
    checks.check_indices("targets", targets, weight.shape[0], "hidden", hidden, ignore_index)
    checks.check_shape("targets", targets, [count], meaning)
    _check_lengths(lengths, count)
    chosen = resolve(implementation, hidden)
    if chosen == "eager":
        out = linear_log_prob_reference(hidden, weight, targets, bias, softcap, temperature, rows, ignore_index)
    else:
        step = chunk_rows or default_chunk_rows(count, weight.shape[0], hidden.device)
        need_grad = hidden.requires_grad and torch.is_grad_enabled()
        hidden, weight = autocast_operands(hidden, weight)
        out, _ = linear_log_prob_op(
            hidden, weight, bias, targets, temperature, softcap, step, need_grad, chosen, rows, ignore_index
        )
    if lengths is None:
        return out
    return torch.stack([part.sum() for part in out.split(list(lengths))]) if lengths else out.new_zeros(0)


def _check_lengths(lengths: Sequence[int] | None, count: int) -> None:
    if lengths is not None and (any(length < 0 for length in lengths) or sum(lengths) != count):
        raise ValueError(
            f"lengths: expected non-negative row counts that sum to {count} (number of targets), got {list(lengths)}"
        )


@scratch_rule("linear_log_prob")
def _(device: torch.device, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> int:
    return head_scratch(targets.shape[0], weight.shape[0], hidden.shape[1], hidden.element_size(), device, chunk_rows)
