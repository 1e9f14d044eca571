"""Products with NF4 weights on a GPU: bitsandbytes' layers with their weight made wide in one launch instead of three.

Layer, weight and what is saved stay bitsandbytes'; only ``forward`` is taken over, for as many rows as a training pass
has. Fewer rows go bitsandbytes' way, which has a kernel of its own for them. Reference and adapted pass have the same
rows, so both go the same way.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Protocol, cast

import torch
from repbend_kernels.blocks import Nf4Scales, dequantize_nf4, made_linear
from torch import Tensor, nn

from repbend_fast.models.causal import CausalLM
from repbend_fast.models.layers.changes import Changes

LEAST_ROWS = 257
"""bitsandbytes multiplies up to 64 to 256 rows, by card, without a wide weight."""


class _Nested(Protocol):
    absmax: Tensor
    code: Tensor
    blocksize: int


class _QuantState(Protocol):
    """What is read of bitsandbytes' ``QuantState``."""

    absmax: Tensor
    code: Tensor
    shape: torch.Size
    blocksize: int
    quant_type: str
    nested: bool
    offset: Tensor | None
    state2: _Nested | None


class _Packed(Protocol):
    """What is read of a weight in 4 bits."""

    quant_state: _QuantState


class _Layer(Protocol):
    weight: nn.Parameter
    bias: nn.Parameter | None
    compute_dtype: torch.dtype | None


class WideWeights:
    """Gives the weight of a layer that :func:`use_nf4_products` has changed, in a dtype."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = cast(_Layer, layer)

    def takes(self, x: Tensor) -> bool:
        """Whether the product with ``x`` is one of a wide weight."""
        state: _QuantState | None = getattr(self._layer.weight, "quant_state", None)
        return state is not None and _takes(self._layer, state, x)

    def __call__(self, dtype: torch.dtype) -> Tensor:
        weight = self._layer.weight
        state = cast(_Packed, weight).quant_state
        scales, (rows, width) = Nf4Scales(state.absmax), state.shape
        if (nested := state.state2) is not None:
            scales = Nf4Scales(state.absmax, nested.code, nested.absmax, state.offset)
        return dequantize_nf4(weight.detach(), state.code, scales, (rows, width), dtype, block=state.blocksize)


def wide_weights(layer: nn.Module) -> WideWeights | None:
    """The weights of a layer that has this module's forward; None for any other."""
    forward = vars(layer).get("forward")
    return WideWeights(layer) if isinstance(forward, partial) and forward.func is _forward else None


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    weights = WideWeights(layer)
    if not weights.takes(x):
        return cast(Tensor, type(layer).forward(layer, x))
    bias = cast(_Layer, layer).bias
    return made_linear(x, None if bias is None else bias.to(x.dtype), weights)


def _takes(layer: _Layer, state: _QuantState, x: Tensor) -> bool:
    return (
        x.shape[-1] == state.shape[1]
        and x.numel() >= LEAST_ROWS * x.shape[-1]
        and x.dtype == (layer.compute_dtype or x.dtype)
        and state.quant_type == "nf4"
        and not (torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling())
        and not (layer.bias is not None and layer.bias.requires_grad)
        and (state.state2 is None or state.state2.blocksize == 256)
    )


def use_nf4_products(model: CausalLM, device: torch.device, changes: Changes | None = None) -> None:
    """Give bitsandbytes' 4-bit layers this module's forward, in place, where ``device`` is a GPU; a second call changes
    nothing.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if device.type != "cuda" or bitsandbytes is None:
        return
    changes = changes or Changes()
    for module in model.modules():
        if type(module) is bitsandbytes.nn.Linear4bit and "forward" not in vars(module):
            changes.entry(vars(module), "forward", partial(_forward, module))
