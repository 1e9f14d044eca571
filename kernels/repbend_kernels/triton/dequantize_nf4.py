"""Triton kernel of ``dequantize_nf4``: a program owns some blocks of weights; their scales are made once for it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dequantize_nf4 import OUTER_BLOCK, Nf4Scales
from ..launch import on_device_of

__all__ = ["OUTER_BLOCK", "WARPS", "WEIGHTS", "dequantize_nf4_kernel"]

WEIGHTS, WARPS = 4096, 4
"""Of a program: 32 weights a thread are 16 bytes of codes, and four stores of 16 bytes in 16 bits."""


@triton.jit
def dequantize_nf4_kernel(
    packed: tl.tensor,
    table: tl.tensor,
    levels: tl.tensor,
    code: tl.tensor,
    outer: tl.tensor,
    offset: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    OUTER: tl.constexpr,
    HALF: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """out = table[bits] · scale of each block of 2·HALF weights; ``count`` are the bytes. ``code`` is None where
    ``levels`` are the scales.
    """
    # int64: the weights of all of a matrix can pass 2³¹.
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    known = blocks * HALF < count
    if code is None:
        scale = tl.load(levels + blocks, mask=known, other=0.0)
    else:
        level = tl.load(levels + blocks, mask=known, other=0).to(tl.int32)
        scale = tl.load(code + level) * tl.load(outer + blocks // OUTER, mask=known, other=0.0) + tl.load(offset)
    bytes = blocks[:, None] * HALF + tl.arange(0, HALF)[None, :]
    both = tl.load(packed + bytes, mask=bytes < count, other=0).to(tl.int32)
    values = tl.interleave(tl.load(table + (both >> 4)), tl.load(table + (both & 15))) * scale[:, None]
    places = blocks[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + places, values.to(out.dtype.element_ty), mask=places < 2 * count)


def launch(
    packed: Tensor, table: Tensor, scales: Nf4Scales, shape: tuple[int, int], block: int, dtype: torch.dtype
) -> Tensor:
    """The matrix of ``shape`` in ``dtype``."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    count = packed.numel()
    if count:
        blocks = max(1, WEIGHTS // block)
        with on_device_of(packed):
            # Not fused: bitsandbytes rounds the product of two scales before it adds the offset.
            dequantize_nf4_kernel[(triton.cdiv(2 * count, blocks * block),)](
                packed,
                table,
                *scales,
                out,
                count,
                OUTER=OUTER_BLOCK,
                HALF=block // 2,
                BLOCKS=blocks,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return out
