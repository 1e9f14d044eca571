"""RMSNorm and the gated product of an MLP, each as one operation that keeps only its inputs for backward.

They compute what transformers' own layers compute, in the same order and dtypes. Those keep more: a norm of 16-bit states its input in
32 bits twice, a gate its activation. On CUDA Liger's kernels take their place; these serve the CPU, planning on fake tensors, and
GPUs without Liger. On a CPU rows are walked in chunks that stay in a core's cache.

Legend: N rows (tokens), D width of a hidden state, I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import starmap
from typing import Literal

import torch
from repbend_kernels.checks import in_own_dtypes
from repbend_kernels.rows import block_rows, blocks
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu_tanh"]

# Elements of a chunk of rows: per thread of a CPU, so that what is made on the way stays in its core's cache; elsewhere few launches
# and little beside a model.
CPU_CHUNK_ELEMENTS = 1 << 17
DEVICE_CHUNK_ELEMENTS = 1 << 21


def chunk_rows(rows: Tensor, device: torch.device) -> int:
    """How many rows of [N, width] are worked on at a time on ``device``."""
    return block_rows(rows.shape[1], device, CPU_CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS)


def _one_chunk(rows: Tensor) -> bool:
    """Few rows without a gradient, as generating has them: an op and an autograd function would cost more than their work."""
    return not torch.is_grad_enabled() and rows.shape[0] <= chunk_rows(rows, rows.device)


def _chunks(rows: Tensor) -> Iterator[slice]:
    count, width = rows.shape
    return starmap(slice, blocks(count, width, rows.device, CPU_CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS))


def _output_dtype(x: Tensor, weight: Tensor, gemma: bool) -> torch.dtype:
    return x.dtype if gemma else torch.promote_types(x.dtype, weight.dtype)


def _norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    """Rows normed and scaled, and 1 / root mean square of each."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * scale
    return (normed * (1.0 + weight.float())).to(x.dtype) if gemma else weight * normed.to(x.dtype), scale


@torch.library.custom_op("repbend_fast::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    """Output [N, D], and 1 / root mean square of each row, [N, 1] float32."""
    out = x.new_empty(x.shape, dtype=_output_dtype(x, weight, gemma))
    scales = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    with in_own_dtypes(x.device):
        for rows in _chunks(x):
            out[rows], scales[rows] = _norm(x[rows], weight, eps, gemma)
    return out, scales


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=_output_dtype(x, weight, gemma)), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("repbend_fast::rms_norm_gradient", mutates_args=())
def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor, gemma: bool) -> Tensor:
    """dx [N, D] in x's dtype: with n = x·s the normed row and g = w·G,  dx = s · (g − n · mean(g·n))."""
    out = torch.empty_like(x)
    with in_own_dtypes(x.device):
        for rows in _chunks(x):
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
    def forward(ctx, x, weight, eps, gemma):
        out, scales = rms_norm_op(x, weight, eps, gemma)
        ctx.save_for_backward(x, weight, scales)
        ctx.gemma = gemma
        return out

    @staticmethod
    def backward(ctx, grad):
        return rms_norm_gradient(grad.contiguous(), *ctx.saved_tensors, ctx.gemma), None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool = False) -> Tensor:
    """Root-mean-square norm (arXiv 1910.07467) of ``x`` [..., D], over D in float32; differentiable in ``x`` alone.

    Args:
        weight: [D], frozen.
        gemma: scale by 1 + weight in float32, as Gemma does; otherwise by weight after rounding to x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not _one_chunk(flat):
        return _RmsNorm.apply(flat, weight, eps, gemma).view(x.shape)
    with in_own_dtypes(x.device):
        return _norm(x, weight, eps, gemma)[0]


def _activate(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


@torch.library.custom_op("repbend_fast::gated_product", mutates_args=())
def gated_product_op(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up, [N, I]."""
    out = gate.new_empty(gate.shape)
    for rows in _chunks(out):
        torch.mul(_activate(gate[rows], activation), up[rows], out=out[rows])
    return out


@gated_product_op.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("repbend_fast::gated_product_gradients", mutates_args=())
def gated_product_gradients(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, [N, I] each."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    for rows in _chunks(grad_gate):
        torch.mul(grad[rows], _activate(gate[rows], activation), out=grad_up[rows])
        inner = grad[rows] * up[rows]
        if activation == "silu":
            grad_gate[rows] = torch.ops.aten.silu_backward(inner, gate[rows])
        else:
            grad_gate[rows] = torch.ops.aten.gelu_backward(inner, gate[rows], approximate="tanh")
    return grad_gate, grad_up


@gated_product_gradients.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_product_op(gate, up, activation)

    @staticmethod
    def backward(ctx, grad):
        return *gated_product_gradients(grad, *ctx.saved_tensors, ctx.activation), None


def gated_product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """act(gate) · up of two tensors [..., I] of one shape and dtype (SwiGLU and GeGLU, arXiv 2002.05202)."""
    rows = gate.reshape(-1, gate.shape[-1])
    if _one_chunk(rows):
        return _activate(gate, activation) * up
    return _GatedProduct.apply(rows, up.reshape(-1, up.shape[-1]), activation).view(gate.shape)
