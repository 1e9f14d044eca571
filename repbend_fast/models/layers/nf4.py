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
from repbend_kernels.blocks import Nf4Scales, nf4_linear
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


class _Layer(Protocol):
    weight: nn.Parameter
    bias: nn.Parameter | None
    compute_dtype: torch.dtype | None


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    own = cast(_Layer, layer)
    state: _QuantState | None = getattr(own.weight, "quant_state", None)
    if state is None or not _takes(own, state, x):
        return cast(Tensor, type(layer).forward(layer, x))
    bias, nested = None if own.bias is None else own.bias.to(x.dtype), state.state2
    scales = (
        Nf4Scales(state.absmax) if nested is None else Nf4Scales(state.absmax, nested.code, nested.absmax, state.offset)
    )
    rows, width = state.shape
    return nf4_linear(x, own.weight.detach(), state.code, scales, (rows, width), bias, block=state.blocksize)


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
