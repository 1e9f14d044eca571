"""Layers that read one x, made by one function of ``repbend_kernels`` where their base layers are frozen and plain, or
in 4 bits.

That function holds what it found of the layers: weights, scalings, dropout. Whether it still holds is seen at each
call from what could have changed, which costs a few dictionary reads a layer; modules, hooks, checks and a function of
autograd for every product cost the host several times as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol, cast

import torch
from repbend_kernels.blocks import MOST_SHARED_RANK, AdaptedLinear, AdaptedLinears
from torch import Tensor, nn

from repbend_fast.models.layers.nf4 import WideWeights, wide_weights


class _Lora(Protocol):
    """What is read of a LoRA layer of PEFT."""

    place: int
    merged_adapters: list[str]
    _disable_adapters: bool
    _active_adapter: str | list[str]
    scaling: Mapping[str, float]


class Joint:
    """What ``layers`` make of one x in one function, where they go together."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._known: list[_Known] = []
        self._linears: AdaptedLinears | None = None

    def __getstate__(self) -> dict[str, object]:
        return vars(Joint(self._layers))

    def of(self, x: Tensor) -> AdaptedLinears | None:
        """The function that makes all layers' outputs of ``x``; None where a layer needs its own forward: with several
        adapters, hooks, a trained or unknown base layer, under autocast, while tracing, or where nothing is kept for a
        backward.
        """
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return None
        known = self._known
        for each in known:
            if not each.holds():
                known = []
                break
        if not known:
            self._known = [_Known(cast(_Lora, layer)) for layer in self._layers]
            self._linears = _joined(self._known)
            known = self._known
        for each in known:
            if each.bias is not None and each.bias.dtype != x.dtype:
                return None
            if each.wide is not None and not each.wide.takes(x):
                return None
        return self._linears


class _Known:
    """What was found of one layer.

    Tables of modules are read directly: ``nn.Module.__getattr__`` looks through three of them.
    """

    def __init__(self, layer: _Lora) -> None:
        self.layer, modules = layer, vars(layer)["_modules"]
        active = layer._active_adapter
        self.active = active if isinstance(active, str) else list(active)
        names = [active] if isinstance(active, str) else active
        names = [name for name in names if name in modules["lora_A"]]
        self.base = modules["base_layer"]
        self.kind = type(self.base)
        self.modules, self.parameters, self.forward = modules, self.base._parameters, vars(self.base).get("forward")
        self.weight, self.bias = self.parameters.get("weight"), self.parameters.get("bias")
        off = layer._disable_adapters or layer.merged_adapters or len(names) != 1 or self.weight is None
        self.name = None if off else names[0]
        self.weights = _weights_of(self.base)
        self.wide = self.weights if isinstance(self.weights, WideWeights) else None
        self.adapters: list[tuple[dict[str, Tensor], Tensor, torch.dtype]] = []
        if self.name is not None:
            self.dropout, self.scaling = modules["lora_dropout"][self.name], layer.scaling[self.name]
            self.p = getattr(self.dropout, "p", 0.0)
            for kind in ("lora_A", "lora_B"):
                table = modules[kind][self.name]._parameters
                self.adapters.append((table, table["weight"], table["weight"].dtype))

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        layer, base, parameters, name = self.layer, self.base, self.parameters, self.name
        if name is None or layer._disable_adapters or layer.merged_adapters or layer._active_adapter != self.active:
            return False
        if self.modules["base_layer"] is not base or type(base) is not self.kind:
            return False
        if parameters.get("weight") is not self.weight:
            return False
        if parameters.get("bias") is not self.bias or vars(base).get("forward") is not self.forward or _is_hooked(base):
            return False
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return False
        for table, weight, dtype in self.adapters:
            if table["weight"] is not weight or weight.dtype != dtype:
                return False
        return getattr(self.dropout, "p", 0.0) == self.p and layer.scaling[name] == self.scaling


def _joined(known: Sequence[_Known]) -> AdaptedLinears | None:
    """The function of all layers; None where they do not go together."""
    first, found = known[0], []
    for each in known:
        if each.name is None or each.weights is None or each.name != first.name or each.p != first.p:
            return None
        (_, a, _), (_, b, _) = each.adapters
        found.append(AdaptedLinear(each.weights, each.bias, a, b, float(each.scaling)))
    if len({layer.a.dtype for layer in found}) > 1 or sum(layer.a.shape[0] for layer in found) > MOST_SHARED_RANK:
        return None
    return AdaptedLinears(found, first.layer.place, first.p)


def _weights_of(base: nn.Module) -> WideWeights | partial[Tensor] | None:
    """Gives the weight of a frozen layer that is nothing but a product, in a dtype; None for any other."""
    if any(p.requires_grad for p in base.parameters(recurse=False)) or _is_hooked(base):
        return None
    if type(base) is nn.Linear and "forward" not in vars(base):
        return partial(_given, base.weight)
    return wide_weights(base)


def _given(weight: Tensor, dtype: torch.dtype) -> Tensor:
    # Not cast: a layer with other states than weights fails here as it does alone.
    return weight


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
