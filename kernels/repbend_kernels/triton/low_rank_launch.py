"""Launches of the kernels of ``lora_down`` and ``lora_up``: one each, and one that adds up parts where there are any.

Legend: N rows, W columns (D or O), r rank.
"""

from itertools import accumulate

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
from .low_rank import (
    lora_down_backward_kernel,
    lora_down_kernel,
    lora_up_backward_kernel,
    lora_up_kernel,
    sum_parts_kernel,
)
from .shared_down import shared_down_backward_kernel, shared_down_kernel


def launch_down(x: Tensor, a: list[Tensor], hashes: Tensor | None, start: int, threshold: int) -> Tensor:
    """P [N, r] in float32; ``a`` are up to three matrices, r the sum of their ranks, ``hashes`` int32 [N] or None."""
    (count, width), (a, ends) = x.shape, _shared(a)
    rank = ends[-1]
    down = torch.empty((count, rank), dtype=torch.float32, device=x.device)
    if not down.numel():
        return down
    sizes = tiles(rank, width, x.dtype, a[0].dtype)
    rows = down_rows(count)
    steps = span_steps(count, width, rows, sizes.walked)
    spans, part = blocks(width, steps * sizes.walked), part_stride(down.numel())
    parts = down if spans == 1 else torch.empty((spans, part), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        kernel = lora_down_kernel if len(a) == 1 else shared_down_kernel
        kernel[(blocks(count, rows), spans)](
            x,
            *_matrices(a),
            down if hashes is None else hashes.contiguous(),
            parts,
            start,
            threshold,
            count,
            width,
            *_ranks(ends),
            steps,
            part,
            *x.stride(),
            *a[0].stride(),
            **_shared_constant(a),
            HAS_MASK=hashes is not None,
            ROWS=rows,
            COLUMNS=sizes.walked,
            RANK=sizes.rank,
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
    sizes = tiles(rank, width, grad.dtype, b.dtype)
    rows, columns = up_back_rows(sizes.rank), blocks(width, sizes.up)
    steps = slab_steps(count, width, rows, sizes.up)
    slabs = blocks(count, steps * rows)
    up_parts, b_parts = _parts(up, columns), _parts(grad_b, slabs)
    with on_device_of(grad):
        lora_up_backward_kernel[(columns, slabs)](
            grad,
            down,
            b,
            down if up_parts is None else up_parts,
            down if b_parts is None else b_parts,
            count,
            width,
            rank,
            steps,
            part_stride(count * rank),
            part_stride(width * rank),
            *grad.stride(),
            *down.stride(),
            *b.stride(),
            HAS_UP=needs[0],
            HAS_B=needs[1],
            ROWS=rows,
            COLUMNS=sizes.up,
            RANK=sizes.rank,
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
    sizes = tiles(rank, width, x.dtype, a[0].dtype)
    steps = slab_steps(count, width, DOWN_BACK_ROWS, sizes.down)
    slabs = blocks(count, steps * DOWN_BACK_ROWS)
    parts = _parts(grad_a, slabs)
    with on_device_of(x):
        kernel = lora_down_backward_kernel if len(a) == 1 else shared_down_backward_kernel
        kernel[(blocks(width, sizes.down), slabs)](
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
            steps,
            part_stride(rank * width),
            *grad_x.stride(),
            *x.stride(),
            *a[0].stride(),
            **_shared_constant(a),
            HAS_MASK=hashes is not None,
            HAS_X=needs[0],
            HAS_A=needs[1],
            ROWS=DOWN_BACK_ROWS,
            COLUMNS=sizes.down,
            RANK=sizes.rank,
            num_warps=WARPS,
        )
        if parts is not None and grad_a is not None:
            _sum([(parts, grad_a)], 1.0)
    return grad_a


def _shared(a: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The matrices in one layout, and where each ends among the ranks of all."""
    if any(each.stride() != a[0].stride() for each in a):
        a = [each.contiguous() for each in a]
    return a, list(accumulate(each.shape[0] for each in a))


def _matrices(tensors: list[Tensor]) -> list[Tensor | None]:
    """As the kernel of one matrix or that of several takes them."""
    return [*tensors] if len(tensors) == 1 else [*tensors, *[None] * (MOST_SHARED - len(tensors))]


def _ranks(ends: list[int]) -> tuple[int, ...]:
    """All ranks and, of several matrices, where the first and the second end."""
    return (ends[-1],) if len(ends) == 1 else (ends[-1], *ends[:2])


def _shared_constant(a: list[Tensor]) -> dict[str, int]:
    return {} if len(a) == 1 else {"SHARED": len(a)}


def _parts(out: Tensor | None, count: int) -> Tensor | None:
    """Room for ``count`` parts of ``out`` in float32."""
    if out is None:
        return None
    return torch.empty((count, part_stride(out.numel())), dtype=torch.float32, device=out.device)


def _sum(sums: list[tuple[Tensor, Tensor]], factor: float) -> None:
    """Each ``out`` = factor · Σ of its parts, one launch for one or two of them."""
    arguments = [(p, out, p.shape[0], p.stride(0), out.numel()) for p, out in sums]
    two = arguments[1] if len(arguments) > 1 else (*arguments[0][:2], 0, 0, 0)
    programs = sum(blocks(size, SUM_BLOCK) for *_, size in (arguments[0], two))
    sum_parts_kernel[(programs,)](*arguments[0], *two, factor, BLOCK=SUM_BLOCK, num_warps=WARPS)


def _check_writable(name: str, tensor: Tensor) -> None:
    """No two elements of ``tensor`` share memory: torch refuses to write there, and a kernel would write twice."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
        raise RuntimeError(f"{name}: its rows or columns share memory, but it is written in place; clone() it")
