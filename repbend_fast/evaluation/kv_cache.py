"""The KV cache that answers are generated with: transformers' own, whose full-attention layers write new tokens into
room ahead of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import Protocol, cast

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from repbend_fast.models.causal import CausalLM

# Positions that a layer grows by: its past is copied once for as many tokens.
ROOM = 64


class _Generating(Protocol):
    """What transformers says of a model's class."""

    # It compiles as one graph with a static cache, so attention sees earlier tokens by cache and mask alone.
    _can_compile_fullgraph: bool

    def _supports_default_dynamic_cache(self) -> bool: ...

    def forward(self) -> object: ...


class _Room:
    """A tensor [B, heads, capacity, D] of which the first positions are in use; the capacity stays below ``most``."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._whole: Tensor | None = None
        self._used: Tensor | None = None

    def append(self, past: Tensor, new: Tensor) -> Tensor:
        """``past`` [B, heads, T, D] and behind it ``new`` [B, heads, n, D], as a view [B, heads, T + n, D].

        ``past`` is copied where it is not what the last call returned (rows were chosen, positions dropped), or where
        the room is used up.
        """
        start = past.shape[-2] if past.numel() else 0
        end = start + new.shape[-2]
        whole = self._whole
        if whole is None or past is not self._used or end > whole.shape[-2]:
            whole = new.new_empty(*new.shape[:-2], max(end, min(end + ROOM, self._most)), new.shape[-1])
            if start:
                whole[..., :start, :] = past
        whole[..., start:end, :] = new
        self._whole, self._used = whole, whole[..., :end, :]
        return self._used


class RoomyLayer(DynamicLayer):
    """``DynamicLayer`` without its concatenation, which copies the whole past for every token.

    Args:
        most: positions that will be needed at most; more are taken, one copy each.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._key_room, self._value_room = _Room(most), _Room(most)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Past and new states [B, heads, T + n, D]: views of the room, valid until rows are chosen from the layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._key_room.append(cast(Tensor, self.keys), key_states)
        self.values = self._value_room.append(cast(Tensor, self.values), value_states)
        return self.keys, self.values


def roomy_cache(model: CausalLM, most: int) -> DynamicCache | None:
    """The cache that ``generate`` would make for ``model``, its full-attention layers roomy for ``most`` positions.
    None where ``generate`` makes another one, or none.
    """
    known = cast(_Generating, model)
    if "past_key_values" not in _arguments(known) or not known._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=cast(PreTrainedConfig, model.config))
    cache.layers[:] = [RoomyLayer(most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def in_room(cache: DynamicCache | None) -> dict[str, object]:
    """The argument of ``generate`` that makes it use ``cache``."""
    return {} if cache is None else {"past_key_values": cache}


def rows_can_leave(cache: DynamicCache) -> bool:
    """Whether ``batch_select_indices`` chooses from all that the cache holds: attention alone, no recurrent state."""
    return all(type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def padding_is_unseen(model: CausalLM, cache: DynamicCache) -> bool:
    """Whether padding between real tokens changes nothing: full attention by mask, and positions that are given."""
    known = cast(_Generating, model)
    whole = all(type(layer) is RoomyLayer for layer in cache.layers)
    return whole and known._can_compile_fullgraph and "position_ids" in _arguments(known)


def _arguments(model: _Generating) -> Container[str]:
    return inspect.signature(model.forward).parameters
