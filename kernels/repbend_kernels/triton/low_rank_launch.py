"""Launches of the kernels of ``lora_down`` and ``lora_up``: one each, and one that adds up parts where there are any.

Legend: N rows, W columns (D or O), r rank.
"""

from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import on_device_of
from ..low_rank_sizes import (
    DOWN_BACK_ROWS,
    MOST_SHARED,
    SUM_BLOCK,
    UP_COLUMNS,
    UP_RANK,
    UP_ROWS,
    WARPS,
    blocks,
    down_rows,
    part_stride,
    slab_steps,
    span_steps,
    tiles,
    up_back_rows,
)
from .low_rank import lora_up_backward_kernel, lora_up_kernel, sum_parts_kernel
from .low_rank_down import lora_down_backward_kernel, lora_down_kernel


class _Cut(NamedTuple):
    """How a launch divides its work: blocks along rows or columns of the grid, parts of the sums, tiles."""

    tile_rows: int
    columns: int
    rank: int
    steps: int
    first: int
    second: int


@cache
def _down_cut(count: int, width: int, rank: int, dtype: torch.dtype, weight: torch.dtype) -> _Cut:
    """Of ``lora_down``: tiles of rows, spans."""
    sizes, rows = tiles(rank, width, dtype, weight), down_rows(count)
    steps = span_steps(count, width, rows, sizes.walked)
    spans = blocks(width, steps * sizes.walked)
    return _Cut(rows, sizes.walked, sizes.rank, steps, blocks(count, rows), spans)


@cache
def _up_backward_cut(count: int, width: int, rank: int, dtype: torch.dtype, weight: torch.dtype) -> _Cut:
    """Of ``lora_up``'s backward: tiles of columns, slabs."""
    sizes = tiles(rank, width, dtype, weight)
    rows = up_back_rows(sizes.rank)
    steps = slab_steps(count, width, rows, sizes.up)
    return _Cut(rows, sizes.up, sizes.rank, steps, blocks(width, sizes.up), blocks(count, steps * rows))


@cache
def _down_backward_cut(count: int, width: int, rank: int, dtype: torch.dtype, weight: torch.dtype) -> _Cut:
    """Of ``lora_down``'s backward: tiles of columns, slabs."""
    sizes, rows = tiles(rank, width, dtype, weight), DOWN_BACK_ROWS
    steps = slab_steps(count, width, rows, sizes.down)
    return _Cut(rows, sizes.down, sizes.rank, steps, blocks(width, sizes.down), blocks(count, steps * rows))


def launch_down(x: Tensor, a: list[Tensor], hashes: Tensor | None, start: int, threshold: int) -> Tensor:
    """P [N, r] in float32; ``a`` are up to three matrices, r the sum of their ranks, ``hashes`` int32 [N] or None."""
    (count, width), (a, ends) = x.shape, _shared(a)
    rank = ends[-1]
    down = torch.empty((count, rank), dtype=torch.float32, device=x.device)
    if not down.numel():
        return down
    cut = _down_cut(count, width, rank, x.dtype, a[0].dtype)
    spans, part = cut.second, part_stride(count * rank)
    parts = down if spans == 1 else torch.empty((spans, part), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        lora_down_kernel[(cut.first, spans)](
            x,
            *_matrices(a),
            down if hashes is None else hashes.contiguous(),
            parts,
            start,
            threshold,
            count,
            width,
            *_ranks(ends),
            cut.steps,
            part,
            *x.stride(),
            *a[0].stride(),
            SHARED=len(a),
            HAS_MASK=hashes is not None,
            ROWS=cut.tile_rows,
            COLUMNS=cut.columns,
            RANK=cut.rank,
            num_warps=WARPS,
        )
        if spans > 1:
            _sum([(parts, down)], 1.0)
    return down


def launch_up(result: Tensor, down: Tensor, b: Tensor, factor: float) -> None:
    """``result`` [N, W] += f · P Bᵀ in place."""
    count, width = result.shape
    if not result.numel() or not down.shape[1]:
        return
    _check_writable("result", result)
    with on_device_of(result):
        lora_up_kernel[(blocks(count, UP_ROWS), blocks(width, UP_COLUMNS))](
            result,
            down,
            b,
            factor,
            count,
            width,
            down.shape[1],
            *result.stride(),
            *down.stride(),
            *b.stride(),
            ROWS=UP_ROWS,
            COLUMNS=UP_COLUMNS,
            RANK=UP_RANK,
            num_warps=WARPS,
        )


def launch_up_backward(
    grad: Tensor, down: Tensor, b: Tensor, factor: float, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those of Q = f · G B [N, r] in float32 and dB = f · Gᵀ P in B's dtype that ``needs`` asks for."""
    (count, width), rank = grad.shape, down.shape[1]
    up = torch.empty((count, rank), dtype=torch.float32, device=grad.device) if needs[0] else None
    grad_b = torch.empty((width, rank), dtype=b.dtype, device=grad.device) if needs[1] else None
    wanted = [out for out in (up, grad_b) if out is not None]
    if not grad.numel() or not rank or not wanted:
        return (None if up is None else up.zero_()), (None if grad_b is None else grad_b.zero_())
    cut = _up_backward_cut(count, width, rank, grad.dtype, b.dtype)
    up_parts, b_parts = _parts(up, cut.first), _parts(grad_b, cut.second)
    with on_device_of(grad):
        lora_up_backward_kernel[(cut.first, cut.second)](
            grad,
            down,
            b,
            down if up_parts is None else up_parts,
            down if b_parts is None else b_parts,
            count,
            width,
            rank,
            cut.steps,
            part_stride(count * rank),
            part_stride(width * rank),
            *grad.stride(),
            *down.stride(),
            *b.stride(),
            HAS_UP=needs[0],
            HAS_B=needs[1],
            ROWS=cut.tile_rows,
            COLUMNS=cut.columns,
            RANK=cut.rank,
            num_warps=WARPS,
        )
        _sum([(p, out) for p, out in ((up_parts, up), (b_parts, grad_b)) if p is not None and out is not None], factor)
    return up, grad_b


def launch_down_backward(
    grad_x: Tensor,
    x: Tensor,
    a: list[Tensor],
    up: list[Tensor],
    hashes: Tensor | None,
    start: int,
    threshold: int,
    needs: list[bool],
) -> Tensor | None:
    """``grad_x`` [N, W] += keep · (Q A) in place where ``needs[0]``; dA = Qᵀ (keep · x) [r, W] in A's dtype where
    ``needs[1]``. ``a`` and ``up`` are up to three matrices each, r the sum of their ranks.
    """
    (count, width), (a, ends) = x.shape, _shared(a)
    rank = ends[-1]
    grad_a = torch.empty((rank, width), dtype=a[0].dtype, device=x.device) if needs[1] else None
    if not x.numel() or not rank or not any(needs):
        return None if grad_a is None else grad_a.zero_()
    if needs[0]:
        _check_writable("the gradient of x", grad_x)
    cut = _down_backward_cut(count, width, rank, x.dtype, a[0].dtype)
    parts = _parts(grad_a, cut.second)
    with on_device_of(x):
        lora_down_backward_kernel[(cut.first, cut.second)](
            grad_x,
            x,
            *_matrices(a),
            *_matrices([each.contiguous() for each in up]),
            up[0] if hashes is None else hashes.contiguous(),
            up[0] if parts is None else parts,
            start,
            threshold,
            count,
            width,
            *_ranks(ends),
            cut.steps,
            part_stride(rank * width),
            *grad_x.stride(),
            *x.stride(),
            *a[0].stride(),
            SHARED=len(a),
            HAS_MASK=hashes is not None,
            HAS_X=needs[0],
            HAS_A=needs[1],
            ROWS=cut.tile_rows,
            COLUMNS=cut.columns,
            RANK=cut.rank,
            num_warps=WARPS,
        )
        if parts is not None and grad_a is not None:
            _sum([(parts, grad_a)], 1.0)
    return grad_a


def _shared(a: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The matrices in one layout, and where each ends among the ranks of all."""
    if len(a) == 1:
        return a, [a[0].shape[0]]
    if any(each.stride() != a[0].stride() for each in a):
        a = [each.contiguous() for each in a]
    return a, list(accumulate(each.shape[0] for each in a))


def _matrices(tensors: list[Tensor]) -> list[Tensor | None]:
    """As a kernel takes up to ``MOST_SHARED`` of them."""
    return [*tensors, *[None] * (MOST_SHARED - len(tensors))]


def _ranks(ends: list[int]) -> tuple[int | None, ...]:
    """All ranks, and where the first and the second matrix of several end."""
    return (ends[-1], None, None) if len(ends) == 1 else (ends[-1], *ends[:2])


def _parts(out: Tensor | None, count: int) -> Tensor | None:
    """Room for ``count`` parts of ``out`` in float32."""
    if out is None:
        return None
    return torch.empty((count, part_stride(out.numel())), dtype=torch.float32, device=out.device)


def _sum(sums: list[tuple[Tensor, Tensor]], factor: float) -> None:
    """Each ``out`` = factor · Σ of its parts, one launch for one or two of them."""
    one, *more = [(p, out, *p.shape, out.numel()) for p, out in sums]
    two = more[0] if more else (*one[:2], 0, 0, 0)
    programs = blocks(one[4], SUM_BLOCK) + blocks(two[4], SUM_BLOCK)
    sum_parts_kernel[(programs,)](*one, *two, factor, BLOCK=SUM_BLOCK, num_warps=WARPS)


def _check_writable(name: str, tensor: Tensor) -> None:
    """No two elements of ``tensor`` share memory: torch refuses to write there, and a kernel would write twice."""
    strides = tensor.stride()
    if 0 in strides and any(stride == 0 and size > 1 for stride, size in zip(strides, tensor.shape)):
        raise RuntimeError(f"{name}: its rows or columns share memory, but it is written in place; clone() it")
