"""Matrix products of 16-bit rows with wider operands, of which no bit is lost that the result could hold.

On CUDA a wide operand enters as the sum of two 16-bit parts, elsewhere the rows are widened.

Legend: n rows, k and m widths, r rank.
"""

from typing import Literal

import torch
from torch import Tensor

# How 16-bit rows meet 32-bit adapter weights: "parts" = the weights in 16-bit parts, as a GPU's matrix units take them,
# "wide" = the rows in 32 bits, None = parts on CUDA and wide elsewhere. Both run everywhere.
PRODUCTS: Literal["parts", "wide"] | None = None


def in_parts(rows: Tensor) -> bool:
    """Whether 16-bit ``rows`` meet a wide operand in its parts."""
    return rows.is_cuda if PRODUCTS is None else PRODUCTS == "parts"


def _mm(left: Tensor, right: Tensor, acc: torch.dtype) -> Tensor:
    """left · right of 16-bit operands in ``acc``, which torch's product for the CPU does not offer."""
    return torch.mm(left, right, out_dtype=acc) if left.is_cuda else left.to(acc) @ right.to(acc)


def parts(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of a 16-bit ``dtype`` whose sum is ``wide`` to about 16 bits."""
    high = wide.to(dtype)
    return high, (wide - high).to(dtype)


def product(left: Tensor, right: Tensor, acc: torch.dtype) -> Tensor:
    """left [n, k] · right [k, m] → [n, m] in ``acc``. ``left`` may have 16 bits: it is not rounded, nor is
    ``right``.
    """
    if left.dtype == acc or left.dtype == right.dtype == acc:
        return left @ right.to(acc)
    if not in_parts(left):
        return left.to(acc) @ right.to(acc)
    if right.dtype == left.dtype:
        return _mm(left, right, acc)
    both = _mm(left, torch.cat(parts(right, left.dtype), dim=1), acc)
    return both[:, : right.shape[1]] + both[:, right.shape[1] :]


def low_rank_operands(left: Tensor, right: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """16-bit operands of one product that stands for left [n, r] · right [r, m] of wider ones: the three larger
    products of parts.
    """
    left_high, left_low = parts(left, dtype)
    right_high, right_low = parts(right.to(left.dtype), dtype)
    return torch.cat((left_high, left_high, left_low), dim=1), torch.cat((right_high, right_low, right_high), dim=0)


def add_product_(out: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """out [n, m] += factor · left [n, r] · right [r, m], rounded once to ``out``'s dtype; ``left`` has the accumulating
    dtype.
    """
    if out.dtype == left.dtype:
        out.addmm_(left, right.to(left.dtype), alpha=factor)
    elif in_parts(out):
        out.addmm_(*low_rank_operands(left, right, out.dtype), alpha=factor)
    else:
        out.copy_(torch.addmm(out.to(left.dtype), left, right.to(left.dtype), alpha=factor))
