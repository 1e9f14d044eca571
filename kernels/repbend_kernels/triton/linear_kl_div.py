"""Triton kernel of ``linear_kl_div``: loss and gradient of one chunk of logits, read twice, the gradient left in their
memory.

Pass 1 takes both soft-max statistics; pass 2 the loss and T(q − p)·slope. A float32 gradient replaces the student's
logits. A 16-bit one, which the GEMM back needs, is packed into the teacher's rows from the left, where
``packing_barrier`` says what has been read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import logit_gradient_scale
from ..launch import on_device_of
from .parts import LOWEST, STAGES, capped, lane_merge, lane_update, packing_barrier

__all__ = ["BLOCK", "WARPS", "kl_div_kernel"]

BLOCK = 2048
WARPS = 8


@triton.jit
def _term(q: tl.tensor, p: tl.tensor, x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """``(p·φ(x), q − p)``, x = log q − log p: near x = 0 both by φ's series.

    There q − p − p·x cancels, and a GPU fuses q − p with the products that made q and p, so that equal distributions
    would differ by a rounding; x is exactly 0 for them. A word with p = 0 adds q, whatever x is: infinite, or NaN where
    both logits are −inf.
    """
    series = p * x * x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * (1.0 / 720.0)))))
    near = tl.abs(x) < 0.25
    difference = tl.where(near, p * x + series, q - p)
    return tl.where(near, series, difference - tl.where(p == 0.0, 0.0, p * x)), difference


@triton.jit(do_not_specialize_on_alignment=["losses"])
def kl_div_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    grad: tl.tensor,
    losses: tl.tensor,
    vocabulary: tl.tensor,
    row_stride: tl.tensor,
    grad_stride: tl.tensor,
    inverse_temperature: tl.tensor,
    softcap: tl.tensor,
    grad_factor: tl.tensor,
    HAS_CAP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    z_row = student + row * row_stride
    r_row = teacher + row * row_stride
    columns = tl.arange(0, BLOCK)
    DEPTH: tl.constexpr = 1 if HAS_CAP else STAGES
    max_q = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    max_p = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    sum_q = tl.zeros([BLOCK], dtype=tl.float32)
    sum_p = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=DEPTH):
        offsets = start + columns
        inside = offsets < vocabulary
        z = capped(tl.load(z_row + offsets, mask=inside, other=0.0), softcap, HAS_CAP) * inverse_temperature
        r = capped(tl.load(r_row + offsets, mask=inside, other=0.0), softcap, HAS_CAP) * inverse_temperature
        max_q, sum_q = lane_update(max_q, sum_q, tl.where(inside, z, float("-inf")))
        max_p, sum_p = lane_update(max_p, sum_p, tl.where(inside, r, float("-inf")))
    top_q, total_q = lane_merge(max_q, sum_q)
    top_p, total_p = lane_merge(max_p, sum_p)
    log_q, log_p = tl.log(total_q), tl.log(total_p)
    inverse_q, inverse_p = 1.0 / total_q, 1.0 / total_p
    loss = tl.zeros([BLOCK], dtype=tl.float32)
    written = -1
    for start in range(0, vocabulary, BLOCK):
        offsets = start + columns
        inside = offsets < vocabulary
        capped_z = capped(tl.load(z_row + offsets, mask=inside, other=0.0), softcap, HAS_CAP)
        z = capped_z * inverse_temperature - top_q
        r = capped(tl.load(r_row + offsets, mask=inside, other=0.0), softcap, HAS_CAP) * inverse_temperature - top_p
        q = tl.exp(z) * inverse_q
        p = tl.exp(r) * inverse_p
        term, difference = _term(q, p, (z - log_q) - (r - log_p))
        loss += tl.where(inside, term, 0.0)
        if HAS_GRAD:
            g = difference * grad_factor
            if HAS_CAP:
                ratio = capped_z / softcap
                g *= 1.0 - ratio * ratio
            if PACKED:
                written = packing_barrier(start // BLOCK, written)
            tl.store(grad + row * grad_stride + offsets, g.to(grad.dtype.element_ty), mask=inside)
    tl.store(losses + row, tl.sum(loss, 0))


def launch_chunk(
    student: Tensor,
    teacher: Tensor,
    losses: Tensor,
    temperature: float,
    softcap: float | None,
    need_grad: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Fills ``losses`` [n] (without T²) and returns d loss/d z [n, V] in ``dtype``, in the memory of a chunk; times
    ``logit_gradient_scale``."""
    packed = dtype != torch.float32
    # Twice as wide a view: 16-bit row k starts where the teacher's float32 row k starts.
    grad = teacher.view(dtype)[:, : teacher.shape[1]] if packed else student
    factor = temperature * logit_gradient_scale(dtype, temperature)
    with on_device_of(student):
        kl_div_kernel[(student.shape[0],)](
            student,
            teacher,
            grad,
            losses,
            student.shape[1],
            student.stride(0),
            grad.stride(0),
            1.0 / temperature,
            1.0 if softcap is None else softcap,
            factor,
            HAS_CAP=softcap is not None,
            HAS_GRAD=need_grad,
            PACKED=packed,
            BLOCK=min(BLOCK, triton.next_power_of_2(student.shape[1])),
            num_warps=WARPS,
        )
    return grad
