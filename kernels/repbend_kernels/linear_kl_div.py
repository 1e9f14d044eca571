"""``linear_kl_div``: KL divergence between two next-token distributions, from hidden states and the head, in row
chunks.

With z = h·Wᵀ + b, capped to c·tanh(z/c) where there is a soft-cap, p = softmax(z_ref/T), q = softmax(z/T):

    loss         = T² Σ over rows of Σ_v p (log p − log q)
    d loss/d z   = T (q − p) · (1 − (z/c)²)
    d loss/d h   = d loss/d z · W

The sum over v is taken as Σ p·φ(log q − log p) with φ(x) = eˣ − 1 − x ≥ 0, which equals it because p and q sum to 1: no
term is negative, and nothing cancels where the distributions are close.

Per chunk: two GEMMs with float32 output, one kernel that reads both logits twice and leaves the gradient in place, one
GEMM back. The gradient is made in forward and only scaled in backward. Memory above the inputs: two (chunk × V) float32
buffers and the gradient of ``hidden`` (float32 where ``hidden`` is float16, whose range would lose it; backward returns
a scaled copy).

Legend: N rows of hidden, R selected rows (R = N where ``rows`` is None), n rows of a chunk, H width, V vocabulary.
"""

import torch
from torch import Tensor

from . import checks
from .context import Context, Gradients
from .head import (
    autocast_operands,
    check_bias,
    check_head,
    check_weight,
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
from .oracles import linear_kl_div_reference
from .rows import blocks
from .scratch import scratch_rule
from .selection import resolve


def _kl_terms(log_q: Tensor, log_p: Tensor, difference: Tensor, p: Tensor) -> Tensor:
    """p·φ(x) of each word, x = log q − log p, from ``difference`` q − p: by φ's series near 0, where q − p − p·x would
    cancel.
    """
    x = log_q - log_p
    # A word with p = 0 adds q, whatever x is: infinite, or NaN where both logits are −inf.
    weighted = (p * x).masked_fill_(p == 0, 0.0)
    series = x.new_full((1, 1), 1 / 120).add(x, alpha=1 / 720)
    for coefficient in (1 / 24, 1 / 6, 1 / 2):
        torch.addcmul(x.new_full((1, 1), coefficient), series, x, out=series)
    series.mul_(x).mul_(weighted)
    return torch.where(x.abs() < 0.25, series, difference - weighted)


def _chunk_torch(
    student: Tensor, teacher: Tensor, temperature: float, softcap: float | None, need_grad: bool
) -> Tensor:
    """Row losses [n] / T²; ``student`` [n, V] receives d loss/d z. The scratch is a few rows at a time."""
    losses = torch.empty(student.shape[0], dtype=student.dtype, device=student.device)
    for start, stop in blocks(student.shape[0], student.shape[1], student.device):
        z, z_ref = student[start:stop], teacher[start:stop]
        q, slope = log_softmax_(z, softcap, temperature)
        p, _ = log_softmax_(z_ref, softcap, temperature)
        difference = q.sub_(p)
        losses[start:stop] = _kl_terms(z, z_ref, difference, p).sum(dim=-1)
        if need_grad:
            torch.mul(difference, temperature, out=z)
            if slope is not None:
                z.mul_(slope)
    return losses


@torch.library.custom_op("repbend_kernels::linear_kl_div", mutates_args=())
def linear_kl_div_op(
    hidden: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_rows: int,
    need_grad: bool,
    implementation: str,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``(loss, d loss/d hidden's selected rows)``, the gradient [R, H] or, where none is needed, [0, H]."""
    acc = checks.accumulate_dtype(hidden.dtype)
    count, vocabulary = reference.shape[0], weight.shape[0]
    losses = torch.empty(count, dtype=acc, device=hidden.device)
    grad = torch.empty(
        (count if need_grad else 0, hidden.shape[1]), dtype=stored_gradient_dtype(hidden.dtype), device=hidden.device
    )
    chunks = head_chunks(count, chunk_rows, hidden.device)
    student_buffer, teacher_buffer = logit_buffers(2, largest_chunk(chunks), vocabulary, acc, hidden.device)
    with checks.in_own_dtypes(hidden.device):
        for start, stop in chunks:
            student, teacher = student_buffer[: stop - start], teacher_buffer[: stop - start]
            logits_into(student, hidden_rows(hidden, rows, start, stop), weight, bias)
            logits_into(teacher, reference[start:stop], reference_weight, reference_bias)
            if implementation == "triton":
                from .triton.linear_kl_div import launch_chunk

                grad_logits = launch_chunk(
                    student, teacher, losses[start:stop], temperature, softcap, need_grad, hidden.dtype
                )
            else:
                losses[start:stop] = _chunk_torch(student, teacher, temperature, softcap, need_grad)
                grad_logits = student
            if need_grad:
                store_gradient(grad[start:stop], grad_logits, weight, acc, temperature)
    return losses.sum() * temperature**2, grad


@linear_kl_div_op.register_fake
def _(
    hidden: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_rows: int,
    need_grad: bool,
    implementation: str,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=checks.accumulate_dtype(hidden.dtype))
    return loss, hidden.new_empty(
        (reference.shape[0] if need_grad else 0, hidden.shape[1]), dtype=stored_gradient_dtype(hidden.dtype)
    )


def _setup(
    ctx: Context, inputs: tuple[Tensor, *tuple[object, ...], Tensor | None], output: tuple[Tensor, Tensor]
) -> None:
    ctx.dtype, ctx.count = inputs[0].dtype, inputs[0].shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[-1])


def _backward(ctx: Context, grad_loss: Tensor, _grad: None) -> Gradients:
    checks.check_first_derivative("linear_kl_div")
    grad, rows = ctx.saved_tensors
    return scaled_gradient(grad, grad_loss, rows, ctx.count, ctx.dtype), *[None] * 11


linear_kl_div_op.register_autograd(_backward, setup_context=_setup)


def linear_kl_div(
    hidden: Tensor,
    reference: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    reduction: str = "sum",
    chunk_rows: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """T² KL(softmax(z_ref/T) ‖ softmax(z/T)) summed over rows, differentiable in ``hidden`` alone.

    Args:
        hidden: [N, H], the states that the head reads; pass only the rows that count, or name them in ``rows``.
        reference: [R, H_ref], the teacher's states of the same rows, no gradient; R = N where ``rows`` is None, and
            H_ref = H unless ``reference_weight`` is given.
        weight: [V, H], the head, frozen.
        rows: int64 [R], unique indices into ``hidden``; None for all rows. They are read chunk by chunk, never copied
            whole.
        bias: [V] or None. A word with −inf on both sides is left out; on the teacher's side alone it counts as never
            said, on the student's side alone the loss is inf. With a soft-cap c, −inf is a logit of −c.
        reference_weight: [V, H_ref], the teacher's own head; None where both share ``weight`` and ``bias``.
        reference_bias: [V], only with ``reference_weight``.
        temperature: T > 0.
        softcap: c > 0 of ``c·tanh(z/c)``, applied to both sides (Gemma-2); None for no cap.
        reduction: ``sum`` over rows or ``mean`` (over the R selected rows); no rows give 0.
        chunk_rows: rows per chunk; None for the size rule (``head.default_chunk_rows``).
        implementation: overrides the switch for this call.

    Returns:
        float32 scalar (float64 for float64), never below 0 by more than rounding.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or reduction; a weight, bias or reference that requires grad.
        IndexError: in debug mode, rows out of range.
        RuntimeError: ``triton`` asked for where it cannot run; in backward, ``create_graph=True``.
    """
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    count = check_head(hidden, rows, weight, bias, softcap, temperature, chunk_rows)
    _check_reference(hidden, rows, reference, weight, reference_weight, reference_bias)
    chosen = resolve(implementation, hidden)
    if chosen == "eager":
        return linear_kl_div_reference(
            hidden, reference, weight, bias, reference_weight, reference_bias, temperature, softcap, reduction, rows
        )
    need_grad = hidden.requires_grad and torch.is_grad_enabled()
    step = chunk_rows or default_chunk_rows(count, weight.shape[0], hidden.device)
    hidden, reference, weight = autocast_operands(hidden, reference, weight)
    teacher = (weight, bias)
    if reference_weight is not None:
        teacher = (autocast_operands(reference_weight)[0], reference_bias)
    total, _ = linear_kl_div_op(
        hidden, reference, weight, bias, *teacher, temperature, softcap, step, need_grad, chosen, rows
    )
    return total / max(count, 1) if reduction == "mean" else total


def _check_reference(
    hidden: Tensor,
    rows: Tensor | None,
    reference: Tensor,
    weight: Tensor,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
) -> None:
    count = hidden.shape[0] if rows is None else rows.shape[0]
    meaning = "rows of hidden" if rows is None else "one row per index in rows"
    checks.check_like("reference", reference, "hidden", hidden)
    checks.check_constant("reference", reference)
    if reference_weight is None:
        if reference_bias is not None:
            raise ValueError("reference_bias: expected None without reference_weight (a shared head shares bias too)")
        checks.check_shape("reference", reference, [count, hidden.shape[1]], f"{meaning}, width of hidden")
        return
    if reference.dim() != 2 or reference.shape[0] != count:
        raise ValueError(f"reference: expected shape [{count}, H_ref] ({meaning}), got {list(reference.shape)}")
    check_weight("reference_weight", reference_weight, reference)
    meaning = "vocabulary of weight, width of reference"
    checks.check_shape("reference_weight", reference_weight, [weight.shape[0], reference.shape[1]], meaning)
    check_bias("reference_bias", reference_bias, reference_weight, reference)


@scratch_rule("linear_kl_div")
def _(device: torch.device, hidden: Tensor, weight: Tensor, reference: Tensor, chunk_rows: int) -> int:
    return head_scratch(reference.shape[0], weight.shape[0], hidden.shape[1], hidden.element_size(), device, chunk_rows)
