"""Passes on weights as they will be once the adapter is merged and rounded to few bits, straight through to LoRA.

A linear layer of the blocks has W and, where it is adapted, s·BA. While :func:`rounded_passes` is entered, its base
gives R x with

    adapter on    R = Q(W + s·BA) − s·BA        so that R x + s·B A x = Q(W + s·BA) x
    adapter off   R = Q(W)                      the reference is the rounded base: at B = 0 both passes are equal bits

Q rounds; its derivative is taken for 1 (straight-through), so that gradients reach A and B by the low-rank part as
ever, and x by R and the low-rank part together, which is Q(W + s·BA). With dropout the low-rank part drops, R does not.

Nothing is kept of R: it is made in the forward and again in the backward, one layer at a time, from weights that do not
change within an optimizer step. So pieces, recomputed blocks and a resumed run have the same R to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import torch
from repbend_kernels.blocks import made_linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.rounded import Place, Round
from repbend_fast.models.layers.stacked import linear_sizes, outer_linears

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


class _Adapted(Protocol):
    """What is read of a LoRA layer of PEFT."""

    def get_base_layer(self) -> nn.Module: ...

    merged: bool
    disable_adapters: bool
    active_adapters: list[str]
    scaling: Mapping[str, float]
    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]


class _Packed(Protocol):
    """What is read of a weight in 4 bits."""

    quant_state: QuantState


@contextmanager
def rounded_passes(blocks: nn.ModuleList, rounding: Round) -> Iterator[None]:
    """The passes inside, their backward included, run on rounded weights of the linear layers of ``blocks``.

    Embedding, head, norms and experts that are parameters stay as they are, and so do layers that are in 4 bits already
    and not adapted.
    """
    changes = Changes()
    try:
        for number, block in enumerate(blocks):
            for name, layer in outer_linears(block):
                base = cast(_Adapted, layer).get_base_layer() if hasattr(layer, "get_base_layer") else layer
                if base is layer and not cast(Tensor, base.weight).is_floating_point():
                    continue
                place = Place(name, number, len(blocks))
                changes.entry(vars(base), "forward", partial(_forward, base, layer, rounding, place))
        yield
    finally:
        changes.undo()


def _forward(base: nn.Module, layer: nn.Module, rounding: Round, place: Place, x: Tensor) -> Tensor:
    adapted = cast(_Adapted, layer)
    on = base is not layer and not (adapted.disable_adapters or adapted.merged)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))

    def weights(dtype: torch.dtype) -> Tensor:
        return _weights(base, adapted if on else None, rounding, place).to(dtype)

    return made_linear(x, cast("Tensor | None", base.bias), weights)


@torch.no_grad()
def _weights(base: nn.Module, adapted: _Adapted | None, rounding: Round, place: Place) -> Tensor:
    """R [O, I]."""
    weight = _dense(base)
    if adapted is None:
        found = rounding(weight.contiguous(), place)
        return weight if found is None else found
    low_rank = _low_rank(adapted, weight)
    merged = (weight + low_rank).contiguous()
    del weight
    found = rounding(merged, place)
    return (merged if found is None else found).sub_(low_rank)


def _dense(base: nn.Module) -> Tensor:
    weight = cast(Tensor, base.weight)
    if not weight.is_floating_point():
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.detach(), cast(_Packed, weight).quant_state)
    weight = weight.detach()
    return weight.T if isinstance(base, Conv1D) else weight


def _low_rank(adapted: _Adapted, weight: Tensor) -> Tensor:
    """s·BA of the active adapters, [O, I] in the weight's dtype; the product is made in A's."""
    total = torch.zeros_like(weight)
    for name in adapted.active_adapters:
        if name in adapted.lora_A:
            total += (adapted.lora_B[name].weight @ adapted.lora_A[name].weight).mul_(adapted.scaling[name])
    return total


def rounding_bytes(blocks: nn.ModuleList) -> int:
    """The most that making R of one layer takes at once and frees again, R included: a layer's weight six times in its
    own dtype of computation, and once in float32.
    """
    sizes = [0]
    for block in blocks:
        for _, layer in outer_linears(block):
            inputs, outputs = cast("tuple[int, int]", linear_sizes(layer))
            weight = next(iter(layer.parameters()))
            itemsize = weight.element_size() if weight.is_floating_point() else 2
            sizes.append(inputs * outputs * (6 * itemsize + 4))
    return max(sizes)
