"""``made_linear``: x Wᵀ + b with weights that are made anew in each direction, so that nothing is kept of them.

The weights are constants: the gradient of x is dy W, and there is none of W or b.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .context import Context


class _MadeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, bias: Tensor | None, weights: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.weights = weights
        return F.linear(x, weights(x.dtype), bias)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weights(grad.dtype), None, None


def made_linear(x: Tensor, bias: Tensor | None, weights: Callable[[torch.dtype], Tensor]) -> Tensor:
    """x Wᵀ + b, [..., O] in the dtype of ``x``.

    Args:
        x: [..., I].
        bias: [O] in the dtype of ``x``, or None.
        weights: gives W [O, I] in the dtype that it is called with; called once forward and once backward, and has to
            give the same bits both times.
    """
    return _MadeLinear.apply(x, bias, weights)
