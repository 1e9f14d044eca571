"""Triton kernels of ``pairwise_cosine``: lengths per state, sums per layer and block of columns, gradient per state.

The sum over a layer's sequences stays inside one program; the columns' partial sums are added in a fixed order
afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device_of, size_rule
from .parts import inverse_root

__all__ = ["COLUMNS", "WALK", "inverse_length_kernel", "unit_sum_backward_kernel", "unit_sum_kernel"]

COLUMNS = 1024
WALK = 4096


@triton.jit
def inverse_length_kernel(
    states: tl.tensor,
    inverse: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    stride_l: tl.tensor,
    stride_b: tl.tensor,
    stride_d: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """inverse[l, b] = 1/‖h‖, 0 for a zero state."""
    program = tl.program_id(0).to(tl.int64)
    row = states + (program // batch) * stride_l + (program % batch) * stride_b
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        offsets = start + columns
        h = tl.load(row + offsets.to(tl.int64) * stride_d, mask=offsets < width, other=0.0).to(tl.float32)
        squares += h * h
    total = tl.sum(squares, 0)
    tl.store(inverse + program, inverse_root(total))


@triton.jit
def unit_sum_kernel(
    states: tl.tensor,
    inverse: tl.tensor,
    summed: tl.tensor,
    partial: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    stride_l: tl.tensor,
    stride_b: tl.tensor,
    stride_d: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """summed[l, columns] = Σ_b ĥ_b; partial[l, block] = Σ over columns of (Σ_b ĥ_b)² − Σ_b ĥ_b²."""
    layer = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    # The pointer walks: b · stride_b may pass 2³¹ where the states are a view.
    row = states + layer * stride_l + columns.to(tl.int64) * stride_d
    for b in range(0, batch):
        h = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        unit = h * tl.load(inverse + layer * batch + b)
        total += unit
        squares += unit * unit
        row += stride_b
    tl.store(summed + layer * width + columns, total, mask=inside)
    tl.store(partial + layer * tl.num_programs(1) + block, tl.sum(total * total - squares, 0))


@triton.jit
def unit_sum_backward_kernel(
    states: tl.tensor,
    summed: tl.tensor,
    inverse: tl.tensor,
    scale: tl.tensor,
    grad: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    stride_l: tl.tensor,
    stride_b: tl.tensor,
    stride_d: tl.tensor,
    scale_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """grad[l, b] = 2·scale[l]/‖h‖ · (s − ĥ(ĥ·s))."""
    program = tl.program_id(0).to(tl.int64)
    layer = program // batch
    row = states + layer * stride_l + (program % batch) * stride_b
    sums = summed + layer * width
    columns = tl.arange(0, BLOCK)
    length = tl.load(inverse + program)
    products = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        offsets = start + columns
        h = tl.load(row + offsets.to(tl.int64) * stride_d, mask=offsets < width, other=0.0).to(tl.float32)
        s = tl.load(sums + offsets, mask=offsets < width, other=0.0)
        products += h * length * s
    along = tl.sum(products, 0)
    factor = 2.0 * length * tl.load(scale + layer * scale_stride)
    for start in range(0, width, BLOCK):
        offsets = start + columns
        h = tl.load(row + offsets.to(tl.int64) * stride_d, mask=offsets < width, other=0.0).to(tl.float32)
        s = tl.load(sums + offsets, mask=offsets < width, other=0.0)
        g = (s - h * length * along) * factor
        tl.store(grad + program * width + offsets, g.to(grad.dtype.element_ty), mask=offsets < width)


def launch_forward(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(Σ over i ≠ j of cos [L], s [L, D], 1/‖h‖ [L, B])``."""
    layers, batch, width = states.shape
    walk, columns = size_rule(width, WALK), size_rule(width, COLUMNS)
    blocks = triton.cdiv(width, columns.block)
    inverse = torch.empty((layers, batch), dtype=torch.float32, device=states.device)
    summed = torch.empty((layers, width), dtype=torch.float32, device=states.device)
    partial = torch.empty((layers, blocks), dtype=torch.float32, device=states.device)
    with on_device_of(states):
        inverse_length_kernel[(layers * batch,)](
            states, inverse, batch, width, *states.stride(), BLOCK=walk.block, num_warps=walk.warps
        )
        unit_sum_kernel[(layers, blocks)](
            states,
            inverse,
            summed,
            partial,
            batch,
            width,
            *states.stride(),
            BLOCK=columns.block,
            num_warps=columns.warps,
        )
    return partial.sum(dim=1), summed, inverse


def launch_backward(states: Tensor, summed: Tensor, inverse: Tensor, scale: Tensor) -> Tensor:
    """``scale`` [L] times the gradient of each layer's similarity, [L, B, D]."""
    layers, batch, width = states.shape
    launch = size_rule(width, WALK)
    grad = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    with on_device_of(states):
        unit_sum_backward_kernel[(layers * batch,)](
            states,
            summed,
            inverse,
            scale,
            grad,
            batch,
            width,
            *states.stride(),
            scale.stride(0),
            BLOCK=launch.block,
            num_warps=launch.warps,
        )
    return grad
