"""Floating-point operations of a step, and how long a card is expected to take for them.

A product of N rows with a matrix of P elements counts 2·N·P. Time is, for each pass of each piece, the longer of its
operations at the card's rate times ``EFFICIENCY``, one reading of the weights at its bandwidth, and the host's time to
launch it; NF4 weights are dequantised before that. Attention is counted, norms and activations are not. Copies to and
from the host are counted in full, though some of them run beside the products.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from repbend_kernels.blocks import default_chunk_rows

from repbend_fast.models.adapters import trainable_parameters
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.stacked import linear_sizes
from repbend_fast.objectives.perturbed import Search
from repbend_fast.objectives.streams import Stream
from repbend_fast.planning.cards import EFFICIENCY, Card
from repbend_fast.planning.host import ASSUMED, HostCost
from repbend_fast.step.levers import Levers
from repbend_fast.step.pieces import Cut, batches, split

HEAD_PRODUCTS = 3
"""Two for the logits of both sides, one for the way back."""


@dataclass(frozen=True)
class Matrices:
    """Elements of one block's frozen and LoRA matrices and of the head; widths of attention and of a hidden state;
    bytes per element in use and as stored.
    """

    block: int
    lora: float
    head: int
    width: int
    hidden: int
    itemsize: int
    stored: float
    first_block: int


def matrices(model: CausalLM, nf4: bool, first_block: int) -> Matrices:
    """The sizes of a PEFT model, which may be on fake tensors."""
    decoder = find_decoder(model)
    frozen = 0
    for module in decoder.layers[0].modules():
        sizes = linear_sizes(module)
        # An adapted layer and the base layer inside it both have the features; its low-rank parts are trainable.
        if sizes and not hasattr(module, "base_layer"):
            weight = getattr(module, "weight", None)
            frozen += sizes[0] * sizes[1] if weight is not None and not weight.requires_grad else 0
    head = model.get_output_embeddings().weight
    lora = sum(p.numel() for p in trainable_parameters(model)) / decoder.num_blocks
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    itemsize = head.element_size()
    return Matrices(frozen, lora, head.numel(), width, head.shape[1], itemsize, 0.516 if nf4 else itemsize, first_block)


@dataclass(frozen=True)
class Passes:
    """A batch that is run: positions of each sequence, padding included; the last hidden state of the adapted pass and
    of the reference pass; whether the head is read.
    """

    lengths: tuple[int, ...]
    stop: int
    reference_stop: int
    reads_head: bool

    @property
    def positions(self) -> int:
        """In all."""
        return sum(self.lengths)


class StepCost:
    """FLOPs by part, and seconds, of the streams of one micro-batch under given levers."""

    def __init__(self, sizes: Matrices, num_blocks: int, card: Card, host: HostCost = ASSUMED) -> None:
        self.sizes = sizes
        self.num_blocks = num_blocks
        self.card = card
        self.host = host
        self._known: dict[tuple[object, ...], list[Passes]] = {}
        self._known_searches: dict[tuple[object, ...], int] = {}
        self._streams: dict[int, Stream] = {}

    @property
    def quantized(self) -> bool:
        """Whether the blocks' weights are dequantised for each pass."""
        return self.sizes.stored < 1

    def flops(self, streams: list[Stream], levers: Levers) -> Counter[str]:
        """FLOPs of one micro-batch: reference, adapted, recompute, backward, head."""
        total: Counter[str] = Counter()
        for batch in self._batches(streams, levers):
            total.update(self._passes(batch, levers))
        for stream in streams:
            if stream.search is not None:
                total["search"] += self._search(stream, stream.search, levers)
            total["head"] += round(2 * HEAD_PRODUCTS * self.sizes.head * stream.head_rows())
        return total

    def seconds(self, streams: list[Stream], levers: Levers) -> float:
        """Expected seconds of streams of one micro-batch."""
        rate = self.card.rate * EFFICIENCY
        total = sum(self._head_seconds(stream, levers, rate) for stream in streams)
        total += sum(self._search(stream, stream.search, levers) / rate for stream in streams if stream.search)
        for batch in self._batches(streams, levers):
            reading, before = self._weights_seconds(batch.stop)
            recomputed = self._recomputed(batch.stop, levers)
            for name, flops in self._passes(batch, levers).items():
                share = recomputed / batch.stop if name == "recompute" else 1.0
                launching = share * batch.stop * self.host.block(name, self.quantized)
                total += max(flops / rate, share * reading, launching) + share * before
            if levers.offload_checkpoints:
                copied = recomputed * batch.positions * self.sizes.hidden * self.sizes.itemsize
                total += 2 * copied / self.card.host
            if levers.offload_embedding and batch.reads_head:
                total += self.sizes.head * self.sizes.itemsize / self.card.host
        return total

    def _batches(self, streams: list[Stream], levers: Levers) -> list[Passes]:
        sizes = [levers.piece_size(stream.name) for stream in streams]
        key = (*map(self._identity, streams), *sizes, levers.packing, levers.merge_streams)
        if key not in self._known:
            cuts = [
                Cut(number, members, tuple(len(stream.sequences[m]) for m in members), size)
                for number, (stream, size) in enumerate(zip(streams, sizes))
                for members in split(stream.sequences, size, levers.layout)
            ]
            found = batches(cuts, levers.layout, levers.merge_streams == "on")
            self._known[key] = [self._of_batch(streams, batch, levers) for batch in found]
        return self._known[key]

    def _identity(self, stream: Stream) -> int:
        """A number that no other stream ever has: the stream is kept, since the id of one that is gone comes again."""
        self._streams[id(stream)] = stream
        return id(stream)

    def _of_batch(self, streams: list[Stream], batch: list[Cut], levers: Levers) -> Passes:
        lengths = [length for cut in batch for length in cut.lengths]
        run = [streams[cut.stream] for cut in batch]
        return Passes(
            tuple(lengths if levers.packing == "on" else [max(lengths)] * len(lengths)),
            max(stream.stop(self.num_blocks) for stream in run),
            max(stream.reference_stop(self.num_blocks) for stream in run),
            any(stream.head_rows() > 0 for stream in run),
        )

    def _recomputed(self, stop: int, levers: Levers) -> int:
        return max(0, min(levers.checkpoint_blocks, stop) - self.sizes.first_block)

    def _passes(self, batch: Passes, levers: Levers) -> Counter[str]:
        sizes, tokens, stop = self.sizes, batch.positions, batch.stop
        # Causal attention: two products of half of T × T per head.
        attention = 2 * sum(n * n for n in batch.lengths) * sizes.width
        forward = 2 * tokens * sizes.block + attention
        low_rank = 2 * tokens * sizes.lora
        trained = stop - sizes.first_block
        found = {
            "reference": batch.reference_stop * forward,
            "adapted": stop * (forward + low_rank),
            "recompute": self._recomputed(stop, levers) * (forward + low_rank),
            "backward": trained * (2 * tokens * sizes.block + 2.5 * attention + 2 * low_rank),
        }
        return Counter({name: round(value) for name, value in found.items() if value})

    def _search(self, stream: Stream, search: Search, levers: Levers) -> int:
        """FLOPs of a stream's search, its head included."""
        key = (self._identity(stream), levers.piece_size(stream.name), levers.packing, levers.checkpoint_blocks)
        if key not in self._known_searches:
            alone = replace(stream.attacked, search=None)
            groups = _lengths(alone, levers, search.prompts)
            stop, reference = alone.stop(self.num_blocks), alone.reference_stop(self.num_blocks)
            runs = (Passes(tuple(group), stop, reference, alone.reads_head) for group in groups)
            passes = sum(sum(self._passes(run, levers).values()) for run in runs)
            head = 2 * HEAD_PRODUCTS * self.sizes.head * sum(term.rows_of() for term in search.terms)
            self._known_searches[key] = search.steps * (passes + head)
        return self._known_searches[key]

    def _weights_seconds(self, blocks: int) -> tuple[float, float]:
        """Of one pass over so many blocks: reading weights beside the products, and dequantising them before."""
        elements = self.sizes.block * blocks
        moved = elements * (self.sizes.stored + self.sizes.itemsize)
        before = moved / self.card.bandwidth if self.quantized else 0.0
        return elements * self.sizes.itemsize / self.card.bandwidth, before

    def _head_seconds(self, stream: Stream, levers: Levers, rate: float) -> float:
        rows = stream.head_rows()
        if not rows:
            return 0.0
        chunk = min(
            rows,
            levers.kl_chunk_rows
            or default_chunk_rows(rows, self.sizes.head // self.sizes.hidden, torch.device(self.card.kind)),
        )
        each = max(2 * chunk * self.sizes.head / rate, self.sizes.head * self.sizes.itemsize / self.card.bandwidth)
        return HEAD_PRODUCTS * each * rows / chunk


def _lengths(stream: Stream, levers: Levers, prompts: tuple[int, ...] | None = None) -> list[list[int]]:
    """Positions of each sequence of each piece, padding included."""
    found = []
    for group in split(stream.sequences, levers.piece_size(stream.name), levers.layout, prompts=prompts):
        lengths = [len(stream.sequences[m]) for m in group]
        found.append(lengths if levers.packing == "on" else [max(lengths)] * len(lengths))
    return found
