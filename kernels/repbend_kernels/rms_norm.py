"""``rms_norm``: a root-mean-square norm that keeps its input and one number per row for backward.

With s = 1/√(mean(x²) + eps) of a row, n = x·s, and w the weight (1 + weight for Gemma's):

    forward   y = w · n                               n rounded to x's dtype before, for Gemma's the product after
    backward  dx = s · (g − n · mean(g·n)),  g = w · dy

It computes what transformers' own layers compute, in the same order and dtypes: sums over D in float32, whatever x is.
Those keep more: of 16-bit states the input in 32 bits, twice. Memory above the inputs: forward, y and s (float32 [N]);
backward, the gradient that it returns.

Legend: N rows (tokens), D width of a hidden state.
"""

import torch
from torch import Tensor

from . import checks
from .checks import in_own_dtypes
from .chunks import chunk_elements, chunks, one_chunk
from .context import Context
from .oracles import rms_norm_reference
from .scratch import scratch_rule
from .selection import resolve


def _output_dtype(x: Tensor, weight: Tensor, gemma: bool) -> torch.dtype:
    return x.dtype if gemma else torch.promote_types(x.dtype, weight.dtype)


def _norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    """Rows normed and scaled, and 1 / root mean square of each."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * scale
    return (normed * (1.0 + weight.float())).to(x.dtype) if gemma else weight * normed.to(x.dtype), scale


@torch.library.custom_op("repbend_kernels::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    """Output [N, D], and 1 / root mean square of each row, [N, 1] float32."""
    out = x.new_empty(x.shape, dtype=_output_dtype(x, weight, gemma))
    scales = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    with in_own_dtypes(x.device):
        for rows in chunks(x):
            out[rows], scales[rows] = _norm(x[rows], weight, eps, gemma)
    return out, scales


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=_output_dtype(x, weight, gemma)), x.new_empty(
        (x.shape[0], 1), dtype=torch.float32
    )


@torch.library.custom_op("repbend_kernels::rms_norm_gradient", mutates_args=())
def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor, gemma: bool) -> Tensor:
    """dx [N, D] in x's dtype: with n = x·s the normed row and g = w·G,  dx = s · (g − n · mean(g·n))."""
    out = x.new_empty(x.shape)
    with in_own_dtypes(x.device):
        for rows in chunks(x):
            scale = scales[rows]
            inner = grad[rows].float() * (1.0 + weight.float()) if gemma else (grad[rows] * weight).to(x.dtype).float()
            normed = x[rows].float() * scale
            inner -= normed * (inner * normed).mean(-1, keepdim=True)
            out[rows] = inner.mul_(scale)
    return out


@rms_norm_gradient.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor, gemma: bool) -> Tensor:
    return x.new_empty(x.shape)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
        out, scales = rms_norm_op(x, weight, eps, gemma)
        ctx.save_for_backward(x, weight, scales)
        ctx.gemma = gemma
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        checks.check_first_derivative("rms_norm")
        return rms_norm_gradient(grad.contiguous(), *ctx.saved_tensors, ctx.gemma), None, None, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, gemma: bool = False, *, implementation: str | None = None
) -> Tensor:
    """Root-mean-square norm (arXiv 1910.07467) of ``x``, over D in float32; differentiable in ``x`` alone.

    Args:
        x: [..., D], any strides.
        weight: [D], frozen.
        eps: is added to the mean of the squares.
        gemma: scale by 1 + weight in float32, as Gemma does; otherwise by weight after rounding to x's dtype.
        implementation: overrides the switch for this call. There is no kernel here (Liger has one): ``triton`` and
            ``torch`` are the same code.

    Returns:
        [..., D] in x's dtype, or without ``gemma`` in the weight's where that is wider.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device; a weight that requires grad.
        RuntimeError: ``triton`` asked for where it cannot run; in backward, ``create_graph=True``.
    """
    checks.check_states("x", x)
    checks.check_float("weight", weight)
    checks.check_shape("weight", weight, x.shape[-1:], "width of x")
    checks.check_device("weight", weight, "x", x)
    checks.check_constant("weight", weight)
    if resolve(implementation, x) == "eager":
        return rms_norm_reference(x, weight, eps, gemma)
    flat = x.reshape(-1, x.shape[-1])
    if not one_chunk(flat):
        return _RmsNorm.apply(flat, weight, eps, gemma).view(x.shape)
    with in_own_dtypes(x.device):
        return _norm(x, weight, eps, gemma)[0]


@scratch_rule("rms_norm", "rms_norm_gradient")
def _(device: torch.device, x: Tensor) -> int:
    # Of a chunk, in 32 bits: the row widened, normed and scaled, in backward the incoming gradient and a product too.
    return 4 * 4 * chunk_elements(x, device)
