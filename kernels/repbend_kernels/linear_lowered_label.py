"""``linear_lowered_label``: cross-entropy to a next-token distribution in which the label is less likely, from hidden
states and the head, in row chunks.

With z = h·Wᵀ + b, capped to c·tanh(z/c) where there is a soft-cap, p = softmax(z), t the row's label, and z_ref the
logits of ``reference``, or of ``hidden`` itself:

    q              = softmax(z_ref − lowered · 1[t]),   a constant
    out_n          = −Σ_v q_v log p_v
    d out_n/d z_v  = (p_v − q_v) · (1 − (z_v/c)²)

Without a reference p − q = p_t (1 − exp(−lowered)) · (1[t] − q), which does not cancel where p_t is small. A lowering
of inf takes the label out of q. As in ``linear_log_prob``, forward makes each row's gradient while the logits are there
and backward scales it. Memory above the inputs: one (chunk × V) float32 buffer, two with a reference, and the gradient
of ``hidden``.

Legend: N rows of hidden, n rows of a chunk, H width, V vocabulary.
"""

import math

import torch
from torch import Tensor

from . import checks
from .context import Context, Gradients
from .head import (
    check_head,
    default_chunk_rows,
    head_scratch,
    hidden_gradient,
    log_softmax_,
    logit_buffers,
    logits_into,
    scaled_gradient,
    stored_gradient_dtype,
)
from .oracles import linear_lowered_label_reference
from .rows import blocks
from .scratch import scratch_rule
from .selection import resolve


def _chunk(student: Tensor, teacher: Tensor | None, labels: Tensor, lowered: float, softcap: float | None) -> Tensor:
    """Losses [n]; ``student`` [n, V] receives d out/d z. The scratch is a few rows at a time."""
    losses = torch.empty(student.shape[0], dtype=student.dtype, device=student.device)
    for start, stop in blocks(student.shape[0], student.shape[1], student.device):
        z, label = student[start:stop], labels[start:stop, None]
        p, slope = log_softmax_(z, softcap, 1.0)
        if teacher is None:
            target = z.clone()
        else:
            target = teacher[start:stop]
            log_softmax_(target, softcap, 1.0)
        target.scatter_add_(1, label, torch.full_like(label, -lowered, dtype=z.dtype))
        q = target.sub_(target.amax(dim=-1, keepdim=True)).exp_()
        q.div_(q.sum(dim=-1, keepdim=True))
        # A word that is never to be said adds nothing, whatever its logarithm is.
        losses[start:stop] = -(q * z.masked_fill_(q == 0, 0.0)).sum(dim=-1)
        if teacher is None:
            taken = p.gather(1, label) * -math.expm1(-lowered)
            torch.mul(q, -taken, out=z).scatter_add_(1, label, taken)
        else:
            torch.sub(p, q, out=z)
        if slope is not None:
            z.mul_(slope)
    return losses


@torch.library.custom_op("repbend_kernels::linear_lowered_label", mutates_args=())
def linear_lowered_label_op(
    hidden: Tensor,
    reference: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lowered: float,
    softcap: float | None,
    chunk_rows: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``(losses [N], their gradients [N, H])``, the gradients [0, H] where none are needed."""
    acc, count = checks.accumulate_dtype(hidden.dtype), labels.shape[0]
    out = torch.empty(count, dtype=acc, device=hidden.device)
    grad = torch.empty(
        (count if need_grad else 0, hidden.shape[1]), dtype=stored_gradient_dtype(hidden.dtype), device=hidden.device
    )
    step = min(chunk_rows, count)
    buffers = logit_buffers(1 if reference is None else 2, step, weight.shape[0], acc, hidden.device)
    with checks.in_own_dtypes(hidden.device):
        for start in range(0, count, max(step, 1)):
            stop = min(start + step, count)
            student, teacher = buffers[0][: stop - start], None
            logits_into(student, hidden[start:stop], weight, bias)
            if reference is not None:
                teacher = buffers[1][: stop - start]
                logits_into(teacher, reference[start:stop], weight, bias)
            out[start:stop] = _chunk(student, teacher, labels[start:stop], lowered, softcap)
            if need_grad:
                grad[start:stop] = hidden_gradient(student, weight, acc)
    return out, grad


@linear_lowered_label_op.register_fake
def _(
    hidden: Tensor,
    reference: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lowered: float,
    softcap: float | None,
    chunk_rows: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    out = hidden.new_empty(labels.shape[0], dtype=checks.accumulate_dtype(hidden.dtype))
    return out, hidden.new_empty(
        (labels.shape[0] if need_grad else 0, hidden.shape[1]), dtype=stored_gradient_dtype(hidden.dtype)
    )


def _setup(ctx: Context, inputs: tuple[Tensor, *tuple[object, ...]], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype, ctx.count = inputs[0].dtype, inputs[0].shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx: Context, grad_out: Tensor, _grad: None) -> Gradients:
    checks.check_first_derivative("linear_lowered_label")
    (grad,) = ctx.saved_tensors
    return scaled_gradient(grad, grad_out[:, None], None, ctx.count, ctx.dtype), *[None] * 8


linear_lowered_label_op.register_autograd(_backward, setup_context=_setup)


def linear_lowered_label(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    lowered: float,
    reference: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Each row's cross-entropy to softmax(z_ref − lowered · 1[label]), differentiable in ``hidden`` alone.

    Args:
        hidden: [N, H], the states that the head reads; pass only the rows that count.
        weight: [V, H], the head, frozen.
        labels: int64 [N], the token of each row that is to be less likely. Out of range: an error in debug mode
            (:func:`set_debug`) and on the CPU.
        lowered: above 0, what its logit is lowered by; ``float("inf")`` takes it out.
        reference: [N, H], the states whose logits the target is made of, no gradient; None = ``hidden``'s own, as a
            constant.
        bias: [V] or None; a word at −inf is left out on both sides.
        softcap: c > 0 of ``c·tanh(z/c)``, on both sides; None for no cap.
        chunk_rows: rows per chunk; None for the size rule (``head.default_chunk_rows``).
        implementation: overrides the switch for this call. There is no kernel of its own: ``triton`` and ``torch`` are
            the same products.

    Returns:
        float32 (float64 for float64) [N].

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or lowering; a weight, bias or reference that requires grad.
        IndexError: in debug mode, labels out of range.
        RuntimeError: ``triton`` asked for where it cannot run; in backward, ``create_graph=True``.
    """
    count = check_head(hidden, None, weight, bias, softcap, 1.0, chunk_rows)
    checks.check_indices("labels", labels, weight.shape[0], "hidden", hidden)
    checks.check_shape("labels", labels, [count], "rows of hidden")
    if not lowered > 0:
        raise ValueError(f"lowered: expected a number > 0, or inf, got {lowered}")
    if reference is not None:
        checks.check_like("reference", reference, "hidden", hidden)
        checks.check_constant("reference", reference)
        checks.check_shape("reference", reference, list(hidden.shape), "those of hidden")
    if resolve(implementation, hidden) == "eager":
        return linear_lowered_label_reference(hidden, weight, labels, lowered, reference, bias, softcap)
    step = chunk_rows or default_chunk_rows(count, weight.shape[0], hidden.device)
    need_grad = hidden.requires_grad and torch.is_grad_enabled()
    out, _ = linear_lowered_label_op(hidden, reference, weight, bias, labels, lowered, softcap, step, need_grad)
    return out


@scratch_rule("linear_lowered_label")
def _(device: torch.device, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int) -> int:
    return head_scratch(labels.shape[0], weight.shape[0], hidden.shape[1], hidden.element_size(), device, chunk_rows)
