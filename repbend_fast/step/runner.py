"""One stream of a training step: reference pass, adapted pass with taps, backward; then everything of it is freed.

Streams are additive, so finishing each before the next gives the same gradient with the largest stream's memory instead of
the sum. Terms that couple the sequences of a stream (pairwise cosine, triplets) stay exact where it is split into pieces: their
sums are taken beforehand, and each piece then differentiates the exact derivative. A piece is atomic: one that runs out of
memory leaves nothing behind and is done again in smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from repbend_fast import ranges
from repbend_fast.config import Config
from repbend_fast.data.records import Sequence
from repbend_fast.models.adapters import trainable_parameters
from repbend_fast.models.decoder import Decoder, Head, find_head
from repbend_fast.models.layers.lora import lora_dropout
from repbend_fast.models.surgery import Prepared, prepared
from repbend_fast.objectives.base import PairwiseCosine, Stream, Triplets
from repbend_fast.step.adapted import adapted_pass
from repbend_fast.step.dropout_keys import row_keys
from repbend_fast.step.levers import Levers
from repbend_fast.step.meter import Meter, StreamResult
from repbend_fast.step.pairwise import PairwiseSums, pairwise_sums, prompts_of
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.pieces import Layout, Piece, make_piece, split
from repbend_fast.step.proof import Proof, prove_model
from repbend_fast.step.reference import ReferenceRows, reference_pass
from repbend_fast.step.retreat import Load, OutOfMemory, attempt, fresh_gradients, retreat
from repbend_fast.step.triplets import TripletSums, always_active, only_active, total_sums, triplet_sums

T = TypeVar("T")


class StreamRunner:
    """Runs streams on one prepared model, which it does not change: ``backward`` for training, ``measure`` for validation.

    Args:
        prepared: of ``models.surgery.prepared``, with these levers; not restored while the runner is in use.
        levers: piece sizes, recomputation and chunks; none of them changes the gradient.
        autocast: dtype of autocast around both passes, or None.
        uses_head: whether any stream has a head term; the head is located, and its restrictions checked, only then.

    Attributes:
        prepared: the model, as a handle to give it back by.
        levers: those in force; running out of memory moves them.
        on_out_of_memory: called with what was changed and the allocator's own words each time that happens.
        proof: what ``checked_runner`` has shown for the model, or None.
    """

    def __init__(self, prepared: Prepared, levers: Levers, *, autocast: torch.dtype | None = None, uses_head: bool = True) -> None:
        model, decoder = prepared.model, prepared.decoder
        self.prepared = prepared
        self.levers = levers
        self.on_out_of_memory: Callable[[str, str], None] | None = None
        self.proof: Proof | None = None
        self.parameters = trainable_parameters(model)
        self.parts = ModelParts(model, decoder, find_head(model) if uses_head else None, decoder.device, autocast)

    @property
    def model(self) -> Any:
        """The PEFT model."""
        return self.parts.model

    @property
    def decoder(self) -> Decoder:
        """The model's decoder."""
        return self.parts.decoder

    @property
    def head(self) -> Head | None:
        """The model's output head, where any stream reads it."""
        return self.parts.head

    @property
    def device(self) -> torch.device:
        """Where the decoder computes."""
        return self.parts.device

    @property
    def units(self) -> dict[int, float]:
        """The units in force, by hidden state (``step/units.py``)."""
        return self.parts.units

    @property
    def layout(self) -> Layout:
        """How pieces are laid out."""
        return self.levers.layout

    def autocasting(self) -> AbstractContextManager[Any]:
        """The autocast context of both passes."""
        return self.parts.autocasting()

    def backward(self, stream: Stream, scale: float = 1.0, *, dropout_seed: int) -> StreamResult:
        """Add the gradient of ``scale × loss`` of this stream to the adapter's parameters, LoRA dropout on.

        Where memory runs out inside a piece, the piece leaves no trace, a lever gives way, and the piece is done again.

        Args:
            dropout_seed: decides the dropout masks, together with the stream's name (``step.dropout_seed``).

        Raises:
            UserError: memory ran out with every lever at its end.
        """
        return self._run(_Run(stream, scale, dropout_seed))

    @torch.no_grad()
    def measure(self, stream: Stream) -> StreamResult:
        """The same terms without dropout and without a gradient."""
        return self._run(_Run(stream))

    @torch.no_grad()
    def reference_rows(self, stream: Stream) -> Iterator[tuple[Piece, ReferenceRows]]:
        """What the stream's terms compare with, piece by piece."""

        def work(piece: Piece) -> tuple[Piece, ReferenceRows]:
            return piece, reference_pass(self.parts, stream, piece, self.layout, self.levers.kl_chunk_rows)

        yield from self._each_piece(stream, stream.sequences, work)

    def _run(self, run: _Run) -> StreamResult:
        meter = Meter(run.stream, self.device)
        for done in self._each_piece(run.stream, run.stream.sequences, lambda piece: self._piece(run, piece)):
            meter.merge(done)
        if run.sums and run.stream.pairwise:
            meter.add(run.stream.pairwise.name, run.sums.value())
        return meter.result()

    def _each_piece(
        self, stream: Stream, sequences: tuple[Sequence, ...], work: Callable[[Piece], T], members: Iterable[int] | None = None
    ) -> Iterator[T]:
        """``work`` on each piece of the sequences, or of those ``members``, in turn. Where memory runs out, what is left is cut anew."""
        waiting = split(sequences, self.levers.piece_size(stream.name), self.layout, members)
        while waiting:
            piece = make_piece(sequences, waiting[0], self.layout, self.device)
            result = attempt(partial(work, piece), self.device)
            if isinstance(result, OutOfMemory):
                self._retreat(stream, piece, result)
                left = [member for members in waiting for member in members]
                waiting = split(sequences, self.levers.piece_size(stream.name), self.layout, left)
            else:
                waiting.pop(0)
                yield result

    def _piece(self, run: _Run, piece: Piece) -> Meter:
        stream, whole = run.stream, len(piece.members) == len(run.stream.sequences)
        sums = run.sums
        if stream.pairwise and not whole and sums is None:
            # The piece's own states complete them: no prompt of it runs twice.
            sums = self._pairwise_sums(run, stream.pairwise, without=piece)
        if stream.triplets and not whole and run.triplet_sums is None:
            run.triplet_sums = self._triplet_sums(run, stream.triplets)
        meter = Meter(stream, self.device)
        meter.tokens = piece.tokens
        with record_function(ranges.REFERENCE):
            reference = reference_pass(self.parts, stream, piece, self.layout, self.levers.kl_chunk_rows)
        with lora_dropout(self.model, run.keys(piece)):
            with record_function(ranges.ADAPTED):
                loss = adapted_pass(self.parts, stream, piece, reference, sums, self.levers, meter, run.triplet_sums)
            if run.scale is not None and loss.requires_grad:
                # Recomputed blocks run in here and draw their masks from the same keys.
                with fresh_gradients(self.parameters), record_function(ranges.BACKWARD):
                    (loss * run.scale).backward()
        # Only now: a piece that ran out of memory is cut anew, and its parts are not in the sums.
        run.sums = sums
        return meter

    def _pairwise_sums(self, run: _Run, term: PairwiseCosine, without: Piece) -> PairwiseSums:
        others = [member for member in range(len(run.stream.sequences)) if member not in without.members]

        def work(prompts: Piece) -> PairwiseSums:
            with lora_dropout(self.model, run.keys(prompts)), record_function(ranges.SUMS):
                return pairwise_sums(self.parts, term, prompts)

        total, *rest = self._each_piece(run.stream, prompts_of(run.stream), work, others)
        for sums in rest:
            total.add(sums)
        return total

    def _triplet_sums(self, run: _Run, term: Triplets) -> dict[int, TripletSums]:
        def work(piece: Piece, known: dict[int, TripletSums] | None = None) -> dict[int, TripletSums]:
            rows = reference_pass(self.parts, run.stream, piece, self.layout).triplets if known else None
            with lora_dropout(self.model, run.keys(piece)), record_function(ranges.SUMS):
                return triplet_sums(self.parts, term, piece, known, rows)

        everything = total_sums(self._each_piece(run.stream, run.stream.sequences, work))
        if always_active(term):
            return everything
        return only_active(everything, total_sums(self._each_piece(run.stream, run.stream.sequences, partial(work, known=everything))))

    def _retreat(self, stream: Stream, piece: Piece, failure: OutOfMemory) -> None:
        rows = [sum(term.spans[m][1] - term.spans[m][0] for m in piece.members) for term in (stream.head, stream.answers) if term]
        vocabulary = self.head.weight.shape[0] if self.head is not None else 0
        load = Load(stream.name, len(piece.members), piece.positions, max(rows, default=0), vocabulary)
        self.levers, change = retreat(self.levers, load, self.decoder.num_blocks, self.device)
        if self.on_out_of_memory:
            self.on_out_of_memory(f"out of memory ({load}): {change} from here on", failure.reason)


@dataclass
class _Run:
    """One call of ``backward``, or of ``measure`` where ``scale`` and ``seed`` are None. The sums exist once the stream is split."""

    stream: Stream
    scale: float | None = None
    seed: int | None = None
    sums: PairwiseSums | None = None
    triplet_sums: dict[int, TripletSums] | None = None

    def keys(self, piece: Piece) -> Tensor | None:
        """The dropout keys of a piece's rows; None = no dropout."""
        return None if self.seed is None else row_keys(piece, self.seed, self.stream.name)


def checked_runner(model: Any, config: Config, levers: Levers, uses_head: bool) -> StreamRunner:
    """The runner of a loaded model, prepared for it, under the recipe's autocast, with what passes take for granted shown on a few tokens.

    Where packing leaks between sequences and was not asked for, the runner pads. ``runner.prepared.restore()`` gives the model back.

    Raises:
        UserError: the head is no plain matrix, or something does not hold (``step.proof``); the model is as before.
    """
    autocast = torch.bfloat16 if config.training.autocast == "bfloat16" else None
    ready = prepared(model, levers, liger=config.model.liger)
    try:
        runner = StreamRunner(ready, levers, autocast=autocast, uses_head=uses_head)
        runner.proof = prove_model(runner.parts, levers.packing, config.memory.packing)
    except BaseException:
        ready.restore()
        raise
    runner.levers = replace(levers, packing=runner.proof.packing)
    return runner
