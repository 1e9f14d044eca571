"""``AdaptedLinears``: the linear layers that read one x, frozen, each with a low-rank part, as one function.

    forward    P = (keep · x) [A_1; A_2; …]ᵀ        y_i = x W_iᵀ + b_i + f_i · P_i B_iᵀ    f_i = s_i / (1 − p)
    backward   Q_i = f_i · G_i B_i                  dB_i = f_i · G_iᵀ P_i
               dx = Σ G_i W_i + keep · (Q A)        dA = Qᵀ (keep · x)

The same numbers as ``lora_down``, ``made_linear`` and ``lora_up`` around each other give, with one node of autograd for
the whole: on a GPU the host's time of a layer goes into nodes, checks and views, not into its few launches. The base
layers' gradients of x are added up by the products themselves.

Kept for backward: what ``low_rank`` keeps. Memory above the inputs: forward, P and the outputs; backward, the gradients
that it returns, Q, and one weight at a time where weights are made.

Legend: N rows (tokens), D inputs, O outputs, r rank, G gradient of y.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks, low_rank
from .context import Context, Gradients
from .low_rank import Remake
from .selection import resolve


class AdaptedLinear(NamedTuple):
    """One layer. ``weights`` gives W [O, D], frozen, in the dtype that it is called with, forward and backward the same
    bits; ``bias`` [O] in x's dtype; ``a`` [r, D] and ``b`` [O, r]; ``scaling``: the adapter's.
    """

    weights: Callable[[torch.dtype], Tensor]
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float


class _Call(NamedTuple):
    """What autograd need not look at of one call."""

    layers: Sequence[AdaptedLinear]
    a: list[Tensor]
    ranks: list[int]
    factors: list[float]
    place: int
    p: float
    remake: Remake | None
    implementation: str


class _AdaptedLinears(torch.autograd.Function):
    """Arguments: x, the rows' hashes, the call, then every A and every B."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, hashes: Tensor | None, call: _Call, *adapter: Tensor) -> tuple[Tensor, ...]:
        shape, chosen = x.shape, call.implementation
        rows = x.reshape(-1, shape[-1])
        down = low_rank.down_product(rows, call.a, hashes, call.place, call.p, chosen)
        outputs = []
        for layer, part, factor in zip(call.layers, low_rank.parts_of(down, call.ranks), call.factors):
            result = F.linear(rows, layer.weights(rows.dtype), layer.bias)
            low_rank.add_up(result, part, layer.b, factor, chosen)
            # Not a view, which autograd would let nobody change in place.
            outputs.append(result.resize_(*shape[:-1], result.shape[-1]))
        kept, make = ((rows,), None) if call.remake is None else call.remake
        ctx.save_for_backward(hashes, down, *adapter, *kept)
        # The call, not the weights as saved tensors: they are frozen, and nobody shall offload or pack them. Without
        # what x is made of again: saved tensors alone are given up by a recomputed block.
        ctx.call, ctx.make, ctx.shape = call._replace(remake=None), make, shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> Gradients:
        call: _Call = ctx.call
        count, needs = len(grads), ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return (None,) * len(needs)
        checks.check_first_derivative("AdaptedLinears")
        hashes, down, *saved = ctx.saved_tensors
        a, b, kept = saved[:count], saved[count : 2 * count], saved[2 * count :]
        needs_x, needs_a = needs[0], any(needs[3 : 3 + count])
        ranks = call.ranks
        grad_x: Tensor | None = None
        ups: list[Tensor] = []
        grads_b: list[Tensor | None] = []
        for i, part in enumerate(low_rank.parts_of(down, ranks)):
            grad, layer = grads[i], call.layers[i]
            if grad is None:
                ups.append(torch.zeros_like(part, memory_format=torch.contiguous_format))
                grads_b.append(None)
                continue
            rows = grad.reshape(-1, grad.shape[-1])
            wanted = [needs_x or needs_a, needs[3 + count + i]]
            up, grad_b = low_rank.up_gradients(rows, part, b[i], call.factors[i], wanted, call.implementation)
            ups.append(part if up is None else up)
            grads_b.append(grad_b)
            if needs_x:
                weight = layer.weights(rows.dtype)
                grad_x = rows @ weight if grad_x is None else grad_x.addmm_(rows, weight)
                del weight
        grads_a: Sequence[Tensor | None] = [None] * count
        if needs_x or needs_a:
            x = low_rank.source_rows(ctx.make, kept)
            target = x.new_empty((0, x.shape[1])) if grad_x is None else grad_x
            grad_a = low_rank.add_down_gradient(
                target, x, list(a), ups, hashes, call.place, call.p, [needs_x, needs_a], call.implementation
            )
            if grad_a is not None:
                found = low_rank.parts_of(grad_a, ranks, 0)
                grads_a = [part if needed else None for part, needed in zip(found, needs[3 : 3 + count])]
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, *grads_a, *grads_b


class AdaptedLinears:
    """Layers that read one x, built once and called for every pass; differentiable in x, and in every A and B.

    Args:
        layers: up to three, whose A are of one dtype and together have at most ``blocks.MOST_SHARED_RANK`` rows.
        place, p: as :func:`lora_down` takes them, for all layers.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or probability.
    """

    def __init__(self, layers: Sequence[AdaptedLinear], place: int = 0, p: float = 0.0) -> None:
        self.layers, self.place, self.p = tuple(layers), place, p
        self._adapter = [*(layer.a for layer in self.layers), *(layer.b for layer in self.layers)]
        self._a = [layer.a for layer in self.layers]
        self._ranks = [layer.a.shape[0] for layer in self.layers]
        # Without dropout, and with it.
        self._factors = [[layer.scaling / kept for layer in self.layers] for kept in (1.0, 1 - p)]
        first = self._adapter[0]
        low_rank.check_weights([layer.a for layer in self.layers], first.shape[-1], first)
        for layer in self.layers:
            checks.check_float("b", layer.b)
            checks.check_device("b", layer.b, "a", first)
            if layer.b.dim() != 2 or layer.b.shape[1] != layer.a.shape[0]:
                raise ValueError(f"b: expected shape [O, {layer.a.shape[0]}], got {list(layer.b.shape)}")

    def __call__(
        self,
        x: Tensor,
        hashes: Tensor | None = None,
        *,
        remake: Remake | None = None,
        implementation: str | None = None,
    ) -> tuple[Tensor, ...]:
        """The layers' outputs [..., O].

        Args:
            x: [..., D] in the dtype of the products.
            hashes: int32 [N], ``blocks.row_hashes`` of the rows' keys; None for no dropout.
            remake: as :func:`lora_down` takes it.
            implementation: overrides the switch for this call.

        Raises:
            ValueError, TypeError: wrong shape, dtype or device.
            RuntimeError: ``triton`` asked for where it cannot run; in backward, ``create_graph=True``.
        """
        chosen = resolve(implementation, x)
        first = self._adapter[0]
        checks.check_device("x", x, "a", first)
        low_rank.check_hashes(x.shape[:-1].numel(), x, hashes, self.p)
        if chosen == "eager":
            return self._eager(x, hashes)
        factors = self._factors[hashes is not None]
        call = _Call(self.layers, self._a, self._ranks, factors, self.place, self.p, remake, chosen)
        return _AdaptedLinears.apply(x, hashes, call, *self._adapter)

    def _eager(self, x: Tensor, hashes: Tensor | None) -> tuple[Tensor, ...]:
        rows, outputs = x.reshape(-1, x.shape[-1]), []
        for layer, factor in zip(self.layers, self._factors[hashes is not None]):
            source, down = low_rank.lora_down(rows, layer.a, hashes, self.place, self.p, implementation="eager")
            result = F.linear(source, layer.weights(x.dtype), layer.bias)
            result = low_rank.lora_up(result, down, layer.b, factor, implementation="eager")
            outputs.append(result.view(*x.shape[:-1], result.shape[-1]))
        return tuple(outputs)
