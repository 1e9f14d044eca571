"""``gated_product``: act(gate) · up of a gated MLP, which keeps its two inputs for backward and no activation.

    forward   y = act(g) · u
    backward  dg = dy · u · act'(g)        du = dy · act(g)

The values are those of transformers' own layers, to the bit. Memory above the inputs: forward, y; backward, the two
gradients that it returns.

Legend: N rows (tokens), I width of the MLP.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks
from .chunks import chunk_elements, chunks, one_chunk
from .context import Context
from .oracles import gated_product_reference
from .scratch import scratch_rule
from .selection import resolve

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS = ("silu", "gelu_tanh")


def _activate(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


@torch.library.custom_op("repbend_kernels::gated_product", mutates_args=())
def gated_product_op(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up, [N, I]."""
    out = gate.new_empty(gate.shape)
    for rows in chunks(out):
        torch.mul(_activate(gate[rows], activation), up[rows], out=out[rows])
    return out


@gated_product_op.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("repbend_kernels::gated_product_gradients", mutates_args=())
def gated_product_gradients(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, [N, I] each."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    for rows in chunks(grad_gate):
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
    def forward(ctx: Context, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_product_op(gate, up, activation)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        checks.check_first_derivative("gated_product")
        return *gated_product_gradients(grad, *ctx.saved_tensors, ctx.activation), None


def gated_product(gate: Tensor, up: Tensor, activation: Activation, *, implementation: str | None = None) -> Tensor:
    """act(gate) · up (SwiGLU and GeGLU, arXiv 2002.05202), differentiable in both.

    Args:
        gate, up: [..., I] of one shape and dtype, any strides.
        activation: ``silu``, or ``gelu_tanh``, which is GELU by its tanh approximation.
        implementation: overrides the switch for this call. There is no kernel here (Liger has one): ``triton`` and
            ``torch`` are the same code.

    Returns:
        [..., I] in their dtype.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or activation.
        RuntimeError: ``triton`` asked for where it cannot run; in backward, ``create_graph=True``.
    """
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_states("gate", gate)
    checks.check_like("up", up, "gate", gate)
    checks.check_shape("up", up, gate.shape, "as gate")
    if resolve(implementation, gate) == "eager":
        return gated_product_reference(gate, up, activation)
    rows = gate.reshape(-1, gate.shape[-1])
    if one_chunk(rows):
        return _activate(gate, activation) * up
    return _GatedProduct.apply(rows, up.reshape(-1, up.shape[-1]), activation).view(gate.shape)


@scratch_rule("gated_product", "gated_product_gradients")
def _(device: torch.device, gate: Tensor) -> int:
    # The activation of a chunk, in backward two such.
    return 2 * gate.element_size() * chunk_elements(gate, device)
