"""Triton kernel of ``linear_log_prob``: log-probability and gradient of one chunk of logits, read twice, gradient left
in their memory.

Pass 1 takes the soft-max statistics; pass 2 ([v = target] − q)/T·slope. A float32 gradient replaces the logits. A
16-bit one, which the GEMM back needs, is packed into its own row from the left, as in ``triton.linear_kl_div``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import logit_gradient_scale
from ..launch import on_device_of
from .parts import LOWEST, STAGES, capped, lane_merge, lane_update, packing_barrier

__all__ = ["BLOCK", "WARPS", "log_prob_kernel"]

BLOCK = 4096
WARPS = 8


@triton.jit(do_not_specialize_on_alignment=["targets", "out"])
def log_prob_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    out: tl.tensor,
    grad: tl.tensor,
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
    z_row = logits + row * row_stride
    columns = tl.arange(0, BLOCK)
    DEPTH: tl.constexpr = 1 if HAS_CAP else STAGES
    maximum = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=DEPTH):
        offsets = start + columns
        inside = offsets < vocabulary
        z = capped(tl.load(z_row + offsets, mask=inside, other=0.0), softcap, HAS_CAP) * inverse_temperature
        maximum, total = lane_update(maximum, total, tl.where(inside, z, float("-inf")))
    top, sum_exp = lane_merge(maximum, total)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    at_target = capped(tl.load(z_row + target, mask=known, other=float("nan")), softcap, HAS_CAP) * inverse_temperature
    tl.store(out + row, (at_target - top) - tl.log(sum_exp))
    if HAS_GRAD:
        inverse = 1.0 / sum_exp
        # The target's logit has to be read by every warp before one of them writes there.
        tl.debug_barrier()
        written = -1
        for start in range(0, vocabulary, BLOCK):
            offsets = start + columns
            inside = offsets < vocabulary
            z = capped(tl.load(z_row + offsets, mask=inside, other=0.0), softcap, HAS_CAP)
            q = tl.exp(z * inverse_temperature - top) * inverse
            g = (tl.where(offsets == target, 1.0, 0.0) - q) * grad_factor
            if HAS_CAP:
                ratio = z / softcap
                g *= 1.0 - ratio * ratio
            if PACKED:
                written = packing_barrier(start // BLOCK, written)
            tl.store(grad + row * grad_stride + offsets, g.to(grad.dtype.element_ty), mask=inside)


def launch_chunk(
    logits: Tensor,
    targets: Tensor,
    out: Tensor,
    temperature: float,
    softcap: float | None,
    need_grad: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Fills ``out`` [n] and returns d out/d z [n, V] in ``dtype``, in the memory of ``logits``; times
    ``logit_gradient_scale``.
    """
    packed = dtype != torch.float32
    grad = logits.view(dtype)[:, : logits.shape[1]] if packed else logits
    with on_device_of(logits):
        log_prob_kernel[(logits.shape[0],)](
            logits,
            targets.contiguous(),
            out,
            grad,
            logits.shape[1],
            logits.stride(0),
            grad.stride(0),
            1.0 / temperature,
            1.0 if softcap is None else softcap,
            logit_gradient_scale(dtype, 1 / temperature) / temperature,
            HAS_CAP=softcap is not None,
            HAS_GRAD=need_grad,
            PACKED=packed,
            BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])),
            num_warps=WARPS,
        )
    return grad
