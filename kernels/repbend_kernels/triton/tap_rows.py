"""Triton kernel of ``tap_rows``: one program per selected row and block of columns. What joins the stream again is
``row_distance.add_rows_kernel``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import addressable, on_device_of, size_rule
from ..rows import count_rows
from .parts import row_start

__all__ = ["COLUMNS", "gather_rows_kernel"]

COLUMNS = 4096


@triton.jit(do_not_specialize=["count_n", "h_inner"], do_not_specialize_on_alignment=["rows", "place"])
def gather_rows_kernel(
    hidden: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    place: tl.tensor,
    count_n: tl.tensor,
    width: tl.tensor,
    h_inner: tl.tensor,
    h_outer_stride: tl.tensor,
    h_inner_stride: tl.tensor,
    h_stride: tl.tensor,
    HAS_PLACE: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out[i] = hidden[rows[i]], NaN where there is no such row; place[rows[i]] = i."""
    i = tl.program_id(0).to(tl.int64)
    n = tl.load(rows + i)
    known = (n >= 0) & (n < count_n)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    row = row_start(hidden, n, h_inner, h_outer_stride, h_inner_stride, FLAT)
    value = tl.load(row + columns.to(tl.int64) * h_stride, mask=inside & known, other=float("nan"))
    tl.store(out + i * width + columns, value, mask=inside)
    if HAS_PLACE:
        tl.store(place + n, i.to(tl.int32), mask=known & (tl.program_id(1) == 0))


def launch_gather(hidden: Tensor, rows: Tensor, *, placed: bool) -> tuple[Tensor, Tensor]:
    """``(copy [R, D], place)``; place is int32 [N] with ``placed``, else [0]."""
    count_n, width, count = count_rows(hidden), hidden.shape[-1], rows.shape[0]
    out = torch.empty((count, width), dtype=hidden.dtype, device=hidden.device)
    place = torch.empty(count_n if placed else 0, dtype=torch.int32, device=hidden.device)
    if count == 0:
        return out, place
    source, address = addressable(hidden)
    launch = size_rule(width, COLUMNS)
    with on_device_of(hidden):
        gather_rows_kernel[(count, triton.cdiv(width, launch.block))](
            source,
            rows.contiguous(),
            out,
            place,
            count_n,
            width,
            *address,
            HAS_PLACE=placed,
            FLAT=address.flat,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )
    return out, place
