"""``dequantize_nf4``: a weight matrix in 4 bits, as bitsandbytes packs it, in one launch (QLoRA, arXiv 2305.14314).

Weight i of the O·D, in the order in which they lie, is table[c_i] · s_b with c_i its four bits (the upper half of byte
i/2 where i is even) and b = i / block. With two-level scales

    s_b = code[levels_b] · outer_{b/256} + offset

and otherwise s_b is given. Products and sums are float32's, each rounded, and then rounded once to the result's dtype:
the values of bitsandbytes' own three kernels to the bit, without their float32 scales in memory.
``nf4_linear`` is the product with such a matrix.

Memory above the inputs: the matrix that it returns; on the torch path blocks of it and the float32 scales.

Legend: O outputs, D inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .made_linear import made_linear
from .oracles import dequantize_nf4_reference
from .scratch import scratch_rule
from .selection import launches_alone, resolve

OUTER_BLOCK = 256
"""Blocks that share an outer scale."""
CHUNK = 1 << 18
"""Bytes that the torch path unpacks at a time."""


class Nf4Scales(NamedTuple):
    """One scale for each block of weights: float32 [blocks] in ``levels``, or two-level ones, where ``levels`` are
    uint8 [blocks], ``code`` float32 [256], ``outer`` float32 [blocks / 256] and ``offset`` a float32 number.
    """

    levels: Tensor
    code: Tensor | None = None
    outer: Tensor | None = None
    offset: Tensor | None = None

    def wide(self) -> Tensor:
        """float32 [blocks]."""
        if self.code is None or self.outer is None or self.offset is None:
            return self.levels
        outer = self.outer.repeat_interleave(OUTER_BLOCK)[: self.levels.numel()]
        return self.code.index_select(0, self.levels.int()) * outer + self.offset


def _dequantize(
    packed: Tensor, table: Tensor, scales: Nf4Scales, shape: tuple[int, int], block: int, dtype: torch.dtype, path: str
) -> Tensor:
    if path == "triton":
        from .triton.dequantize_nf4 import launch

        return launch(packed, table, scales, shape, block, dtype)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    flat, codes, wide = out.view(-1), packed.reshape(-1), scales.wide()
    step = max(1, 2 * CHUNK // block) * block // 2
    for start in range(0, codes.numel(), step):
        both = codes[start : start + step].int()
        values = table.index_select(0, torch.stack((both >> 4, both & 15), 1).view(-1))
        first = 2 * start // block
        each = wide[first : first + -(-values.numel() // block)].repeat_interleave(block)[: values.numel()]
        flat[2 * start : 2 * start + values.numel()] = values.mul_(each)
    return out


@torch.library.custom_op("repbend_kernels::dequantize_nf4", mutates_args=())
def dequantize_nf4_op(
    packed: Tensor,
    table: Tensor,
    levels: Tensor,
    code: Tensor | None,
    outer: Tensor | None,
    offset: Tensor | None,
    rows: int,
    width: int,
    block: int,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    """The weight [rows, width] in ``dtype``."""
    scales = Nf4Scales(levels, code, outer, offset)
    return _dequantize(packed, table, scales, (rows, width), block, dtype, implementation)


@dequantize_nf4_op.register_fake
def _(
    packed: Tensor,
    table: Tensor,
    levels: Tensor,
    code: Tensor | None,
    outer: Tensor | None,
    offset: Tensor | None,
    rows: int,
    width: int,
    block: int,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    return packed.new_empty((rows, width), dtype=dtype)


def dequantize_nf4(
    packed: Tensor,
    table: Tensor,
    scales: Nf4Scales,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    block: int = 64,
    implementation: str | None = None,
) -> Tensor:
    """A matrix of 4-bit weights in ``dtype``; no gradient.

    Args:
        packed: uint8, two weights each, of any shape, contiguous.
        table: float32 [16], what each four bits stand for.
        scales: of the blocks.
        shape: (O, D) of the matrix, an even number of weights.
        dtype: of the result.
        block: weights that share a scale, a power of two from 32 on.
        implementation: overrides the switch for this call.

    Returns:
        [O, D].

    Raises:
        ValueError, TypeError: sizes that do not belong together, or another dtype than uint8.
        RuntimeError: ``triton`` asked for where it cannot run.
    """
    count = shape[0] * shape[1]
    _check(packed, table, scales, count, block)
    path = resolve(implementation, packed)
    if path == "eager":
        return dequantize_nf4_reference(packed, table, scales.wide(), shape, block, dtype)
    if launches_alone(path, packed):
        return _dequantize(packed, table, scales, shape, block, dtype, path)
    return dequantize_nf4_op(packed, table, *scales, *shape, block, dtype, path)


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    table: Tensor,
    scales: Nf4Scales,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    *,
    block: int = 64,
    implementation: str | None = None,
) -> Tensor:
    """x Wᵀ + bias of a frozen 4-bit W, which is made wide for each product; differentiable in ``x`` alone.

    Args:
        x: [..., D], in the dtype of the products.
        packed, table, scales, shape, block, implementation: as :func:`dequantize_nf4` takes them.
        bias: [O] of ``x``'s dtype.

    Returns:
        [..., O] in ``x``'s dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dequantize_nf4`; ``x`` of another width.
    """
    if x.shape[-1] != shape[1]:
        raise ValueError(f"x: expected width {shape[1]}, got {x.shape[-1]}")
    # A function, not the parts of the weight: they are frozen, and nobody shall offload or pack them as saved ones.
    return made_linear(
        x,
        bias,
        lambda dtype: dequantize_nf4(packed, table, scales, shape, dtype, block=block, implementation=implementation),
    )


def _check(packed: Tensor, table: Tensor, scales: Nf4Scales, count: int, block: int) -> None:
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected uint8, got {packed.dtype}")
    if 2 * packed.numel() != count:
        raise ValueError(f"packed: expected {count} weights, two in each byte, got {2 * packed.numel()}")
    if block < 32 or block & (block - 1):
        raise ValueError(f"block: expected a power of two from 32 on, got {block}")
    if table.numel() != 16:
        raise ValueError(f"table: expected 16 values, got {table.numel()}")
    blocks = -(-count // block)
    if scales.levels.numel() != blocks:
        raise ValueError(f"scales: expected one for each of {blocks} blocks, got {scales.levels.numel()}")
    if (scales.levels.dtype == torch.uint8) != (scales.code is not None):
        raise TypeError("scales: levels are uint8 with code, outer and offset, or float32 alone")
    if scales.outer is not None and scales.outer.numel() * OUTER_BLOCK < blocks:
        raise ValueError(f"scales: expected {-(-blocks // OUTER_BLOCK)} outer ones, got {scales.outer.numel()}")


@scratch_rule("dequantize_nf4")
def _(device: torch.device, packed: Tensor, levels: Tensor, block: int) -> int:
    # Of a chunk: bytes, both halves and their stack as 32-bit numbers, values and their scales; and all scales, with
    # the outer ones, the levels and products of both beside them.
    return 4 * 9 * min(packed.numel(), CHUNK + block) + 4 * 5 * levels.numel() + 4 * OUTER_BLOCK
