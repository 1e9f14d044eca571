"""LoRA's forward and backward with the least memory, and dropout whose masks follow keys of the rows.

PEFT's layers keep their weights, names, saving, merging and switching off; only what ``forward`` does with the low-rank
part is replaced, by ``repbend_kernels.lora_down`` and ``lora_up`` around the base layer, whatever that is.

Layers that read one x (``layers.readers``: q, k and v; gate and up) share one mask and one reading of x.

Kept for backward: x by reference or, where ``layers.recompute`` knows how it was made, what it
was made of; A's product with it; and the rows' hashed keys, which all layers share. PEFT keeps x, the mask, the dropped
x (in A's dtype, so in 32 bits for a 16-bit model), A's product, and makes up to four tensors of the output's size on
the way.

The training step gives the rows' keys (:func:`lora_dropout`). Without them a layer does what PEFT's does: in training
mode each call draws masks from torch's generator, in evaluation mode there is no dropout.

Legend: N rows (tokens), D inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, Protocol, cast

import torch
from repbend_kernels import lora_down, lora_up
from repbend_kernels.blocks import MOST_SHARED_RANK, Remake, row_hashes
from torch import Tensor, nn

from repbend_fast.errors import UserError
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.joint import Joint
from repbend_fast.models.layers.readers import Readers, groups_of
from repbend_fast.models.layers.recompute import Origin, origin_of


class DropoutKeys:
    """What all adapted layers of a model share.

    ``rows`` are the hashed keys (int32 [N]) of the rows that the pass in progress runs, None for no dropout. ``given``
    says whether :func:`lora_dropout` decides; where it does not, dropout follows the layers' training mode. ``readers``
    are the groups of layers that read one tensor.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.given = False
        self.readers: list[_Readers] = []


class _Down(NamedTuple):
    """One adapter's part of a layer, before B: P [N, r], and the share of x that dropout has kept."""

    adapter: str
    product: Tensor
    kept: float


class _Read(NamedTuple):
    """What a layer makes of x: x [N, D] for the base layer, and the adapters' parts."""

    source: Tensor
    downs: list[_Down]


class _Adapted(Protocol):
    """What is read of a LoRA layer of PEFT."""

    merged: bool
    disable_adapters: bool
    active_adapters: list[str]
    base_layer: nn.Module
    scaling: Mapping[str, float]
    lora_variant: Mapping[str, object]
    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]
    lora_dropout: Mapping[str, nn.Module]


class LowRankForward(nn.Module):
    """What an adapted layer of PEFT gets in front of its own class: the same layer, with this module's forward.

    ``place`` names its dropout masks, which ``readers``, where there are several of one x, have in common.
    """

    dropout_keys: DropoutKeys
    place: int
    readers: _Readers | None
    joint: _Joints

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The base layer's output plus the active adapters' parts, [..., O] in the base layer's dtype."""
        layer = cast(_Adapted, self)
        if layer.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        read = self._read(x) if not layer.disable_adapters else _Read(x.reshape(-1, x.shape[-1]), [])
        if isinstance(read, Tensor):
            return read
        result = layer.base_layer(read.source)
        for name, down, kept in read.downs:
            result = lora_up(result, down, layer.lora_B[name].weight, float(layer.scaling[name] / kept))
        return result.view(*x.shape[:-1], result.shape[-1])

    def _read(self, x: Tensor) -> _Read | Tensor:
        """What comes before B, or the layer's output where it was made with others' or in one function."""
        readers = self.readers
        if readers is not None and not torch.compiler.is_compiling():
            if (made := readers.taken(self, x)) is not None:
                return made
            if not readers.apart:
                if (outputs := self._outputs(self.joint.group, x)) is not None:
                    return readers.give(self, x, outputs)
                if _alike(readers.layers):
                    return readers.give(self, x, self._make(readers.layers, x))
        if (outputs := self._outputs(self.joint.alone, x)) is not None:
            return outputs[0]
        return self._make([self], x)[0]

    def _outputs(self, joint: Joint, x: Tensor) -> Sequence[Tensor] | None:
        """The outputs of all layers of ``joint``, under the keys of the pass; None where they do not go together."""
        if not self.dropout_keys.given or (linears := joint.of(x)) is None:
            return None
        hashes = self._given_keys(x) if linears.p else None
        return linears(x, hashes, remake=_remake(origin_of(x), x, [layer.a for layer in linears.layers]))

    def _make(self, layers: list[LowRankForward], x: Tensor) -> list[_Read]:
        """What each of ``layers``, which have the same adapters, makes of ``x``."""
        # Two dimensions: with three, a bias makes the output a view, and adding to it in place would copy its gradient.
        flat, origin = x.reshape(-1, x.shape[-1]), origin_of(x)
        downs: list[list[_Down]] = [[] for _ in layers]
        for name in _active(cast(_Adapted, self)):
            hashes, p = self._dropout(name, flat)
            weights = [cast(_Adapted, layer).lora_A[name].weight for layer in layers]
            source, products = self._down(flat, weights, origin, hashes, p)
            for own, product in zip(downs, products):
                own.append(_Down(name, product, 1.0 if hashes is None else 1 - p))
            # Where x needs no gradient the base layer has none to make.
            flat = source if x.requires_grad else flat
        return [_Read(flat, own) for own in downs]

    def _dropout(self, name: str, x: Tensor) -> tuple[Tensor | None, float]:
        """The hashed keys of x's rows, and p; None = no dropout."""
        module, keys = cast(_Adapted, self).lora_dropout[name], self.dropout_keys
        p = getattr(module, "p", 0.0)
        if p == 0:
            return None, p
        if not keys.given:
            if not (self.training and module.training):
                return None, p
            # At every call anew, from the generator that checkpointing sets back: a recomputed block draws the same
            # masks.
            return torch.randint(-(2**31), 2**31, x.shape[:1], dtype=torch.int32, device=x.device), p
        return self._given_keys(x), p

    def _given_keys(self, x: Tensor) -> Tensor | None:
        rows, count = self.dropout_keys.rows, x.shape[:-1].numel()
        if rows is not None and rows.shape[0] != count:
            raise ValueError(f"lora_dropout: keys for {rows.shape[0]} rows, but the pass has {count}")
        return rows

    def _down(
        self, x: Tensor, weights: list[Tensor], origin: Origin | None, hashes: Tensor | None, p: float
    ) -> tuple[Tensor, list[Tensor]]:
        return lora_down(x, weights, hashes, self.place, p, remake=_remake(origin, x, weights))


class _Joints(NamedTuple):
    """A layer in one function of its own, and with those that read its x."""

    alone: Joint
    group: Joint


def _remake(origin: Origin | None, x: Tensor, weights: list[Tensor]) -> Remake | None:
    """How backward makes ``x`` again, where it knows and there will be one; it counts as a reader."""
    if origin is None or not torch.is_grad_enabled() or not (x.requires_grad or any(a.requires_grad for a in weights)):
        return None
    origin.recomputation.readers += 1
    return origin.inputs, origin.recomputation.read


_Readers = Readers[LowRankForward, _Read | Tensor]


def _active(layer: _Adapted) -> list[str]:
    """The adapters that take part in a pass."""
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def _alike(layers: list[LowRankForward]) -> bool:
    """Whether one launch serves all layers: the same adapters in one dtype, dropout alike, and few ranks in all."""
    first = cast(_Adapted, layers[0])
    names = _active(first)
    for layer in (cast(_Adapted, each) for each in layers[1:]):
        if layer.merged or _active(layer) != names or layers[0].training != cast(nn.Module, layer).training:
            return False
        for name in names:
            one, two = first.lora_dropout[name], layer.lora_dropout[name]
            if getattr(one, "p", 0.0) != getattr(two, "p", 0.0) or one.training != two.training:
                return False
            if first.lora_A[name].weight.dtype != layer.lora_A[name].weight.dtype:
                return False
    return all(
        sum(cast(_Adapted, layer).lora_A[name].weight.shape[0] for layer in layers) <= MOST_SHARED_RANK
        for name in names
    )


@cache
def _with_low_rank_forward(base: type) -> type:
    return type(f"LowRank{base.__name__}", (LowRankForward, base), {})


def use_low_rank_forward(model: CausalLM, changes: Changes | None = None) -> None:
    """Give every LoRA layer of a PEFT model this module's forward, in place; a second call changes nothing.

    Raises:
        UserError: a kind of adapter whose forward is not plain LoRA (DoRA, a LoRA bias, an adapted embedding or 8-bit
            layer).
    """
    from peft.tuners.lora import LoraLayer

    layers = [(name, cast(_Adapted, module)) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    changes, keys = changes or Changes(), DropoutKeys()
    for name, layer in layers:
        if isinstance(layer, LowRankForward):
            return
        if type(layer).__name__ not in ("Linear", "Linear4bit"):
            raise UserError(
                f"the adapter on {name} is of kind {type(layer).__name__}; only LoRA on linear and 4-bit layers can be "
                "trained"
            )
        if layer.lora_variant or any(linear.bias is not None for linear in layer.lora_B.values()):
            raise UserError(
                f"the adapter on {name} is not plain LoRA (use_dora, lora_bias or another variant); train one without "
                "it"
            )
    places, by_name = {name: place for place, (name, _) in enumerate(layers)}, dict(layers)
    for group in groups_of(places):
        readers: _Readers | None = None
        if len(group) > 1 and len({_inputs(by_name[name]) for name in group}) == 1:
            readers = Readers([cast(LowRankForward, by_name[name]) for name in group])
            keys.readers.append(readers)
        together = Joint([cast(nn.Module, by_name[name]) for name in group])
        for name in group:
            layer = by_name[name]
            changes.kind(layer, _with_low_rank_forward(layer.__class__))
            changes.entry(vars(layer), "dropout_keys", keys)
            changes.entry(vars(layer), "place", places[group[0]] if readers else places[name])
            changes.entry(vars(layer), "readers", readers)
            alone = Joint([cast(nn.Module, layer)]) if readers else together
            changes.entry(vars(layer), "joint", _Joints(alone, together))


def _inputs(layer: _Adapted) -> int:
    return next(iter(layer.lora_A.values())).weight.shape[1]


def set_dropout_rate(model: CausalLM, p: float, changes: Changes | None = None) -> None:
    """Let LoRA's dropout drop the share ``p``, in place; no other dropout of the model."""
    changes = changes or Changes()
    for module in model.modules():
        for dropout in getattr(module, "lora_dropout", {}).values():
            if getattr(dropout, "p", p) != p:
                changes.attribute(dropout, "p", p)


def drops_out(model: CausalLM) -> bool:
    """Whether any adapted layer's dropout has a rate above 0."""
    layers = (module for module in model.modules() if isinstance(module, LowRankForward))
    return any(getattr(rate, "p", 0.0) > 0 for layer in layers for rate in cast(_Adapted, layer).lora_dropout.values())


@contextmanager
def lora_dropout(model: CausalLM, keys: Tensor | None) -> Iterator[None]:
    """LoRA's dropout, and only LoRA's, for the passes inside, their backward included (recomputed blocks read the keys
    again).

    The keys decide, whatever the mode. A model's own dropout stays off: it would make the adapted pass differ from the
    reference at B = 0.

    Args:
        keys: int64 [N] or [B, T], one for each row of the pass: rows of equal keys get equal masks, in each layer
            another. None switches dropout off.

    Raises:
        UserError: keys for a model whose layers :func:`use_low_rank_forward` has not prepared.
        ValueError: from a pass whose number of rows is not that of the keys.
    """
    shared = next((module.dropout_keys for module in model.modules() if isinstance(module, LowRankForward)), None)
    if shared is None:
        if keys is not None:
            raise UserError(
                "this model has no LoRA adapter that is prepared for training; attach one, then use_low_rank_forward"
            )
        yield
        return
    previous = shared.rows, shared.given
    shared.rows, shared.given = None if keys is None else row_hashes(keys.reshape(-1)), True
    try:
        yield
    finally:
        shared.rows, shared.given = previous
        for readers in shared.readers:
            readers.forget()
