"""How high a stream's memory goes, from a few pieces run on fake tensors through the real ``StreamRunner``.

The peak of a piece is the largest of a few phases, each of them affine in its positions, so the line between two sizes
never lies below it. In the number of recomputed blocks the phases are the end of the forward pass, where a recomputed
block keeps its input alone, and the recomputation of one block with the inputs of those before it. The runs use the top
few blocks of the model only, at two depths whose difference is one block's share; ``plan`` checks what it chose at full
depth.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from repbend_kernels.blocks import head_scratch

from repbend_fast.config import Config
from repbend_fast.errors import UserError, one_line
from repbend_fast.models.adapters import adapted_blocks, trainable_parameters
from repbend_fast.models.autocast import autocast_dtype
from repbend_fast.models.causal import AdaptedLM, CausalLM
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.layers.rounded_passes import rounding_bytes
from repbend_fast.models.surgery import prepared
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import rows_in
from repbend_fast.planning.known_results import KnownResults
from repbend_fast.planning.scratch import HEAD_OPS, op_scratch
from repbend_fast.planning.shapes import FAKE_MODE, fake_zeros, shape_model
from repbend_fast.planning.tracker import MemoryTracker, module_tensors, tensor_bytes
from repbend_fast.step import StreamRunner
from repbend_fast.step.levers import Levers

KNOWN = KnownResults(FAKE_MODE)
DEPTHS = (2, 3)
"""Blocks that a stream runs through in the two shallow models, which have one more."""


@dataclass(frozen=True)
class Peak:
    """Bytes above everything that stays (weights, adapter, accumulated gradients, optimizer).

    ``outside``: the peak without the scratch of the head's chunks. ``at_head``: what that scratch comes on top of; None
    = no head.
    """

    outside: float
    at_head: float | None = None

    def total(self, scratch: int) -> int:
        """The peak with ``scratch`` bytes in the head's chunks."""
        return int(max(self.outside, 0 if self.at_head is None else self.at_head + scratch))


def mix(low: Peak, high: Peak, share: float) -> Peak:
    """The point ``share`` of the way from ``low`` to ``high``; beyond 1 it goes on along the line."""
    outside = low.outside + (high.outside - low.outside) * share
    if low.at_head is None or high.at_head is None:
        return Peak(outside)
    return Peak(outside, low.at_head + (high.at_head - low.at_head) * share)


def measure_piece(
    model: CausalLM, stream: Stream, levers: Levers, device: torch.device, autocast: torch.dtype | None
) -> Peak:
    """Run ``stream`` on a model of fake tensors, as ``device`` would, gradients of an earlier piece being there.

    Raises:
        UserError: the model does something that shapes alone cannot decide.
    """
    return measure_batch(model, [stream], levers, device, autocast)


def measure_batch(
    model: CausalLM, streams: Seq[Stream], levers: Levers, device: torch.device, autocast: torch.dtype | None
) -> Peak:
    """The same of several streams, which share their passes where ``levers`` merge them."""
    tracker = MemoryTracker(op_scratch(device), apart=HEAD_OPS, known=KNOWN)
    before = track_streams(tracker, model, streams, levers, autocast)
    return Peak(tracker.peak - before, None if tracker.at_op is None else tracker.at_op - before)


def track_stream(
    tracker: MemoryTracker, model: CausalLM, stream: Stream, levers: Levers, autocast: torch.dtype | None
) -> int:
    """Run ``stream`` under ``tracker``; returns the bytes of the model and of accumulated gradients, which
    it watches.
    """
    return track_streams(tracker, model, [stream], levers, autocast)


def track_streams(
    tracker: MemoryTracker, model: CausalLM, streams: Seq[Stream], levers: Levers, autocast: torch.dtype | None
) -> int:
    """The same of several streams."""
    with prepared(model, levers) as ready:
        uses_head = any(stream.needs_head for stream in streams)
        return _track(tracker, StreamRunner(ready, levers, autocast=autocast, uses_head=uses_head), streams)


def _track(tracker: MemoryTracker, runner: StreamRunner, streams: Seq[Stream]) -> int:
    model = runner.model
    # Constants take no memory, whatever their values.
    for search in (stream.search for stream in streams if stream.search is not None):
        runner.units.update(dict.fromkeys(search.states, 1.0))
    runner.units.update(dict.fromkeys((layer for stream in streams for layer in stream.layers), 1.0))
    streams = [replace(s, search=s.search.brief()) if s.search is not None else s for s in streams]
    trained = trainable_parameters(model)
    for parameter in trained:
        parameter.grad = fake_zeros(parameter)
    tracker.watch(module_tensors(model), "weights")
    tracker.watch(trained, "adapter")
    tracker.watch([p.grad for p in trained if p.grad is not None], "gradients")
    before = tracker.live
    try:
        with tracker:
            runner.backward_all(streams, dropout_seed=0)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"memory.budget: this model cannot be planned from shapes ({one_line(error)}); leave the budget out and "
            "set "
            "memory.piece_tokens and memory.checkpoint_blocks by hand"
        ) from error
    model.zero_grad(set_to_none=True)
    return before


@dataclass(frozen=True)
class StreamPeak:
    """Peaks of one stream's pieces at two sizes, without recomputation and with all of it.

    Attributes:
        positions: of the smaller and the larger piece.
        plain, recomputed: their peaks, in this order.
        block: what one block that is not recomputed adds to each of ``plain``.
        total: positions of the whole stream at worst, ``longest`` of its longest sequence.
        stop, first: the stream runs blocks 0 … stop − 1, and blocks before ``first`` hold nothing for backward.
        lighter: what the longest single sequence has less than a piece of shorter ones of as many positions, having
            fewer rows.
        checkpoint_bytes: of one recomputed block's input, per position.
        head_rows: rows per position that the head reads, 0 without a head.
    """

    name: str
    positions: tuple[int, int]
    plain: tuple[Peak, Peak]
    recomputed: tuple[Peak, Peak]
    block: tuple[float, float]
    total: int
    longest: int
    stop: int
    first: int
    lighter: int
    checkpoint_bytes: int
    head_rows: float

    def peak(self, positions: int, checkpoint_blocks: int) -> Peak:
        """A piece of ``positions`` with the first ``checkpoint_blocks`` blocks recomputed."""
        low, high = self.positions
        share = (positions - low) / (high - low) if high > low else 0.0
        block = self.block[0] + (self.block[1] - self.block[0]) * share
        kept = self.checkpoint_bytes * positions
        blocks = max(0, self.stop - self.first)
        done = min(blocks, max(0, checkpoint_blocks - self.first))
        plain, recomputed = mix(*self.plain, share), mix(*self.recomputed, share)
        at_head = None if plain.at_head is None else plain.at_head - done * (block - kept)
        if not done:
            return plain
        outside = max(plain.outside - done * (block - kept), recomputed.outside - (blocks - done) * kept)
        return Peak(outside, at_head)

    def single(self, checkpoint_blocks: int) -> Peak:
        """The same for the longest sequence alone."""
        peak = self.peak(self.longest, checkpoint_blocks)
        return Peak(peak.outside - self.lighter, None if peak.at_head is None else peak.at_head - self.lighter)

    def deeper(self, stop: int) -> StreamPeak:
        """The stream in passes that go on to ``stop``, as those do that it shares with a deeper one."""
        more = stop - self.stop

        def add(peaks: tuple[Peak, Peak], blocks: tuple[float, float]) -> tuple[Peak, Peak]:
            found = [
                Peak(peak.outside + more * block, None if peak.at_head is None else peak.at_head + more * block)
                for peak, block in zip(peaks, blocks)
            ]
            return found[0], found[1]

        low, high = self.positions
        inputs = (float(low * self.checkpoint_bytes), float(high * self.checkpoint_bytes))
        return replace(self, stop=stop, plain=add(self.plain, self.block), recomputed=add(self.recomputed, inputs))


def shared_peak(peaks: Seq[StreamPeak], positions: int, checkpoint_blocks: int) -> tuple[Peak, StreamPeak]:
    """A bound for any mixture of streams in one batch of ``positions``, and a stream with the most of everything.

    Each position takes no more than one of the most expensive stream, run as deep as the deepest.
    """
    stop = max(peak.stop for peak in peaks)
    deep = [peak.deeper(stop) for peak in peaks]
    found = [peak.peak(positions, checkpoint_blocks) for peak in deep]
    heads = [peak.outside if peak.at_head is None else peak.at_head for peak in found]
    head_rows = max(peak.head_rows for peak in deep)
    most = replace(deep[0], name="merged", first=max(peak.first for peak in deep), head_rows=head_rows)
    return Peak(max(peak.outside for peak in found), max(heads) if head_rows else None), most


def shallow(stream: Stream, stop: int, to: int) -> tuple[Stream, int]:
    """``stream`` as the top ``to`` of its ``stop`` blocks see it, and how many (rows × layers) of references were cut
    away.
    """
    shift = stop - to
    found = [term.moved(shift, to) for term in stream.terms]
    search, searched = stream.search.moved(shift, to) if stream.search else (None, 0)
    terms = tuple(term for term, _ in found if term is not None)
    return replace(stream, terms=terms, search=search), searched + sum(cut for _, cut in found)


class PeakMeter:
    """Measures streams of one recipe at two shallow depths and carries the peaks to full depth."""

    def __init__(
        self,
        whole: CausalLM,
        config: Config,
        window: tuple[int, ...],
        device: torch.device,
        packing: Literal["on", "off"],
    ) -> None:
        self.whole = whole
        self.num_blocks = num_blocks = find_decoder(whole).num_blocks
        self.device = device
        self.packing = packing
        self.autocast = autocast_dtype(config, device)
        blocks = adapted_blocks(config.lora, max(window), num_blocks)
        self.first_block = min(blocks)
        self.block_gradients = tensor_bytes(trainable_parameters(whole)) // len(blocks)
        self._config, self._window = config, window
        embedding = whole.get_input_embeddings().weight
        self.width, self.itemsize = embedding.shape[1], embedding.element_size()
        rounds = config.training.nf4_every is not None
        self.rounding_bytes = rounding_bytes(find_decoder(whole).layers) if rounds else 0

    @cached_property
    def models(self) -> list[AdaptedLM]:
        """The shallow models; none of a model that is too shallow itself."""
        found = []
        for depth in DEPTHS if self.num_blocks > DEPTHS[-1] + 1 else ():
            lora = self._config.lora.model_copy(update={"blocks": list(range(depth + 1))})
            found.append(shape_model(self._config.model, lora, self._window, depth + 1))
        return found

    def at_full_depth(self, stream: Stream, recompute: bool) -> tuple[Peak, float | None]:
        """The peak of ``stream`` in one piece, all of its blocks recomputed or none, and one block's share of it.

        A model too shallow to be cut is measured as it is, and no share is known. A search and what follows it are
        measured apart, since they reach other depths.
        """
        if stream.search is None:
            return self._at_full_depth(stream, recompute)
        search, share = self._at_full_depth(stream.attacked, recompute)
        after, other = self._at_full_depth(replace(stream, search=None), recompute)
        found = stream.search.rows * len(stream.search.states) * self.width * self.itemsize
        after = Peak(after.outside + found, None if after.at_head is None else after.at_head + found)
        heads = [head for head in (search.at_head, after.at_head) if head is not None]
        larger = Peak(max(search.outside, after.outside), max(heads, default=None))
        return larger, share if search.outside > after.outside else other

    def _at_full_depth(self, stream: Stream, recompute: bool) -> tuple[Peak, float | None]:
        stop = stream.reach(self.num_blocks)
        if stop <= DEPTHS[-1] + 1:
            levers = Levers(checkpoint_blocks=stop if recompute else 0, packing=self.packing)
            peak = measure_piece(self.whole, stream, levers, self.device, self.autocast)
            return peak, None
        found = []
        for model, depth in zip(self.models, DEPTHS):
            # The last hidden state of a whole model is read behind its norm, that of a shortened one is not.
            to = depth + 1 if stop == self.num_blocks else depth
            smaller, cut = shallow(stream, stop, to)
            levers = Levers(checkpoint_blocks=to if recompute else 0, packing=self.packing)
            peak = measure_piece(model, smaller, levers, self.device, self.autocast)
            extra = cut * self.width * self.itemsize
            found.append((to, Peak(peak.outside + extra, None if peak.at_head is None else peak.at_head + extra)))
        (low, shallow_peak), (high, deep_peak) = found
        if recompute:
            # Deep down in a backward pass the gradients made so far may outweigh the inputs that are still kept.
            deep_peak = replace(
                deep_peak, outside=max(deep_peak.outside, shallow_peak.outside + (high - low) * self.block_gradients)
            )
        blocks = max(0, stop - self.first_block)
        return mix(shallow_peak, deep_peak, (blocks - low) / (high - low)), (
            deep_peak.outside - shallow_peak.outside
        ) / (high - low)

    def stream_peak(self, small: Stream, large: Stream, total: int, longest: int, single_rows: int) -> StreamPeak:
        """Peaks of a stream from a small and a large piece of it.

        Args:
            single_rows: rows of the longest sequence alone.
        """
        stop = small.reach(self.num_blocks)
        plain, recomputed, blocks = [], [], []
        positions = (sum(map(len, small.sequences)), sum(map(len, large.sequences)))
        for stream, count in zip((small, large), positions):
            bare, share = self.at_full_depth(stream, False)
            least, _ = self.at_full_depth(stream, True)
            plain.append(bare)
            recomputed.append(least)
            # Where the share is not known, the straight line between no block and all.
            blocks.append(
                (bare.outside - least.outside) / stop + self.width * self.itemsize * count if share is None else share
            )
        rows, layers = _rows(large)
        per_position = rows / positions[1]
        lighter = max(0, int(per_position * longest - single_rows)) * layers * self.width * self.itemsize
        head_rows = large.head_rows() / positions[1]
        return StreamPeak(
            small.name,
            positions,
            (plain[0], plain[1]),
            (recomputed[0], recomputed[1]),
            (blocks[0], blocks[1]),
            total,
            longest,
            stop,
            min(self.first_block, stop),
            lighter,
            self.width * self.itemsize,
            head_rows,
        )

    @property
    def head_bytes(self) -> int:
        """Of the output head's weight."""
        return tensor_bytes([self.whole.get_output_embeddings().weight])

    def scratch(self, peak: StreamPeak, positions: int, chunk_rows: int | None) -> int:
        """Bytes in the head's chunks for a piece of ``positions``."""
        return self.chunk_bytes(int(peak.head_rows * positions), chunk_rows) if peak.head_rows else 0

    def chunk_bytes(self, rows: int, chunk_rows: int | None) -> int:
        """Bytes in the chunks of a head loss over ``rows``."""
        head = self.whole.get_output_embeddings().weight
        autocast = self.autocast is not None
        return head_scratch(
            rows, head.shape[0], head.shape[1], self.itemsize, self.device, chunk_rows, autocast=autocast
        )


def _rows(stream: Stream) -> tuple[int, int]:
    """Rows of the term that compares most of them, and over how many layers references of all terms are kept."""
    compared = [(rows_in(term.compared_spans), len(term.compared_layers)) for term in stream.terms]
    most = max((rows for rows, _ in compared), default=0)
    return (most, round(sum(rows * layers for rows, layers in compared) / most)) if most else (0, 0)
