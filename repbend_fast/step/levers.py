"""The levers that trade time for memory. The gradient is the same wherever they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch

from repbend_fast.config.schema import MemoryConfig
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.varlen import attention_of
from repbend_fast.step.pieces import Layout

EVERY_STREAM = "*"
"""Key of ``Levers.piece_tokens`` for the streams that are not named there."""

LARGE_CARD = 40 * 10**9
"""Bytes of a card from which on streams share their passes without a plan."""


@dataclass(frozen=True)
class Levers:
    """Resolved levers of a run.

    Attributes:
        piece_tokens: most positions of a piece, padding included, by stream name; ``"*"`` stands for all others. A
            stream without a size is one piece.
        checkpoint_blocks: this many first decoder blocks are recomputed in backward.
        offload_checkpoints: inputs of recomputed blocks wait in host memory.
        offload_embedding: input embedding and head live in host memory.
        kl_chunk_rows: rows per chunk of the head's losses; None = the op's size rule.
        packing: ``on`` lays the sequences of a piece out in one row, ``off`` pads them on the right.
        merge_streams: ``on`` lets pieces of different streams share a pass, as far as each one's size allows.
        share_beginnings: ``on`` lays tokens that all sequences of a row begin with out once, where dropout is off. No
            plan counts on it: what is shared depends on the data, and sizes of pieces are without it.
    """

    piece_tokens: Mapping[str, int] = field(default_factory=dict)
    checkpoint_blocks: int = 0
    offload_checkpoints: bool = False
    offload_embedding: bool = False
    kl_chunk_rows: int | None = None
    packing: Literal["on", "off"] = "off"
    merge_streams: Literal["on", "off"] = "off"
    share_beginnings: Literal["on", "off"] = "off"

    def piece_size(self, stream: str) -> int | None:
        """Most positions of a piece of this stream, or None for one piece."""
        return self.piece_tokens.get(stream, self.piece_tokens.get(EVERY_STREAM))

    @property
    def layout(self) -> Layout:
        """How ``pieces.make_piece`` lays a piece out."""
        return "packed" if self.packing == "on" else "padded"

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; ``Levers(**values)`` gives them back."""
        return asdict(self) | {"piece_tokens": dict(self.piece_tokens)}


def default_levers(memory: MemoryConfig, num_blocks: int, device: torch.device, attention: str) -> Levers:
    """The levers as set by hand; ``auto`` is one piece, no recomputation, no offload and the op's chunk rule.

    Args:
        num_blocks: decoder blocks of the model, which is what ``checkpoint_blocks: all`` means.
        device: where the model computes.
        attention: the name of the attention in use (``layers.varlen.attention_of``).
    """
    blocks = memory.checkpoint_blocks
    return Levers(
        piece_tokens=_piece_tokens(memory),
        checkpoint_blocks=num_blocks if blocks == "all" else 0 if blocks == "auto" else min(blocks, num_blocks),
        # The runner moves nothing where the device is the host, so a plan must not count on it.
        offload_checkpoints=memory.offload_checkpoints is True and device.type == "cuda",
        offload_embedding=memory.offload_embedding is True and device.type != "cpu",
        kl_chunk_rows=None if memory.kl_chunk_rows == "auto" else memory.kl_chunk_rows,
        packing=(packing := _packing(memory, device, attention)),
        merge_streams=_merging(memory, device, packing),
    )


def levers_of(memory: MemoryConfig, model: CausalLM) -> Levers:
    """``default_levers`` for a loaded model."""
    decoder = find_decoder(model)
    weight = model.get_input_embeddings().weight
    attention = attention_of(decoder.body, weight, decoder.device)
    return default_levers(memory, decoder.num_blocks, decoder.device, attention)


def _piece_tokens(memory: MemoryConfig) -> dict[str, int]:
    if isinstance(memory.piece_tokens, int):
        return {EVERY_STREAM: memory.piece_tokens}
    return dict(memory.piece_tokens.items()) if isinstance(memory.piece_tokens, Mapping) else {}


def _packing(memory: MemoryConfig, device: torch.device, attention: str) -> Literal["on", "off"]:
    """Packed where padding costs more than a mask: on the CPU, and where the attention backend has a varlen kernel."""
    if memory.packing != "auto":
        return memory.packing
    return "on" if device.type == "cpu" or "flash" in attention else "off"


def _merging(memory: MemoryConfig, device: torch.device, packing: Literal["on", "off"]) -> Literal["on", "off"]:
    """Shared passes on cards that are fast and large: they wait for launches, and have room for a whole batch."""
    if memory.merge_streams != "auto":
        return memory.merge_streams
    large = device.type == "cuda" and torch.cuda.is_available()
    large = large and torch.cuda.get_device_properties(device).total_memory >= LARGE_CARD
    return "on" if large and packing == "on" else "off"
