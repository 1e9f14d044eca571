"""One stream of a training step: reference pass, adapted pass with taps, backward; then everything of it is freed.

Streams are additive, so finishing each before the next gives the same gradient with the largest stream's memory instead
of the sum. Terms that couple the sequences of a stream stay exact where it is split into pieces: their sums are taken
beforehand, and each piece then differentiates the exact derivative. A piece is atomic: one that runs out of memory
leaves nothing behind and is done again in smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from repbend_fast import ranges
from repbend_fast.config import Config
from repbend_fast.data.records import Sequence
from repbend_fast.distributed.ranks import ALONE, Ranks
from repbend_fast.errors import UserError
from repbend_fast.models.adapters import trainable_parameters
from repbend_fast.models.autocast import autocast_dtype
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import Decoder, Head, find_head
from repbend_fast.models.layers.lora import lora_dropout
from repbend_fast.models.layers.truncated import Visit
from repbend_fast.models.load import resolve_device
from repbend_fast.models.surgery import Prepared, prepared
from repbend_fast.objectives.perturbed import Search
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Term
from repbend_fast.step.adapted import adapted_pass
from repbend_fast.step.dropout_keys import row_keys
from repbend_fast.step.levers import Levers
from repbend_fast.step.meter import Meter, StreamResult
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.pieces import Layout, Piece, make_piece, split
from repbend_fast.step.proof import Proof, prove_model
from repbend_fast.step.reference import reference_pass
from repbend_fast.step.retreat import Load, OutOfMemory, attempt, fresh_gradients, retreat
from repbend_fast.step.searched import Deltas, Found, searched
from repbend_fast.step.terms import Execution, Place, execution_of

T = TypeVar("T")


class StreamRunner:
    """Runs streams on one prepared model, which it does not change: ``backward`` for training, ``measure`` for
    validation.

    Args:
        prepared: of ``models.surgery.prepared``, with these levers; not restored while the runner is in use.
        levers: piece sizes, recomputation and chunks; none of them changes the gradient.
        autocast: dtype of autocast around both passes, or None.
        uses_head: whether any stream has a head term; the head is located, and its restrictions checked, only then.
        ranks: processes of which each runs a share of every stream and has that share of the gradient.

    Attributes:
        prepared: the model, as a handle to give it back by.
        levers: those in force; running out of memory moves them.
        on_out_of_memory: called with what was changed and the allocator's own words each time that happens.
        proof: what ``checked_runner`` has shown for the model, or None.
    """

    def __init__(
        self,
        prepared: Prepared,
        levers: Levers,
        *,
        autocast: torch.dtype | None = None,
        uses_head: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        model, decoder = prepared.model, prepared.decoder
        self.prepared = prepared
        self.levers = levers
        self.ranks = ranks
        self.on_out_of_memory: Callable[[str, str], None] | None = None
        self.proof: Proof | None = None
        self.parameters = trainable_parameters(model)
        head = find_head(model) if uses_head else None
        self.parts = ModelParts(model, decoder, head, decoder.device, autocast, lockstep=ranks.lockstep)

    @property
    def model(self) -> CausalLM:
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

    def autocasting(self) -> AbstractContextManager[object]:
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
    def reference_rows(self, stream: Stream) -> Iterator[list[dict[int, Tensor]]]:
        """The rows that the stream's terms compare with, piece by piece: of each term by hidden state."""

        def work(piece: Piece) -> list[dict[int, Tensor]]:
            return [execution.kept for execution in self.compared(stream.terms, self._place(stream, piece, Meter()))]

        yield from self._each_piece(stream, stream.sequences, work)

    def compared(self, terms: Iterable[Term], place: Place) -> list[Execution[Term]]:
        """The executions of ``terms`` behind a reference pass over a piece."""
        executions = [execution_of(term)(term, place) for term in terms]
        reference_pass(place, executions)
        return executions

    def _run(self, run: _Run) -> StreamResult:
        sequences, meter = run.stream.sequences, Meter()
        run.shares = self._shares(run)
        if run.stream.search is not None:
            run.found = self._search(run, run.stream.search)
        self._take_sums(run)
        for done in self._each_of_share(run, sequences, lambda piece: self._piece(run, piece)):
            meter.merge(done)
        if run.shares:
            meter.total(self.ranks)
        result = StreamResult(torch.zeros((), device=self.device), tokens=sum(map(len, sequences)))
        for number, term in enumerate(run.stream.terms):
            execution_of(term).report(term, meter, result, run.sums.get(number))
        result.weigh(run.stream.weights)
        return result

    def _search(self, run: _Run, search: Search) -> Found:
        """The stream's perturbation, searched in pieces of whole prompts: those that this process's share begins with.
        In lockstep all search everything, which takes the same passes.
        """
        attacked = Stream(run.stream.name, search.sequences, search.terms)
        members = None
        if run.shares and not self.ranks.lockstep:
            own = {search.shared[member] for member in run.shares[self.ranks.number]}
            members = [member for member, prompt in enumerate(search.prompts) if prompt in own]

        def work(piece: Piece) -> dict[int, Deltas]:
            return searched(self._place(attacked, piece, Meter()), search)

        deltas: dict[int, Deltas] = {}
        with record_function(ranges.SEARCH):
            for found in self._each_piece(attacked, search.sequences, work, members, search.prompts):
                deltas.update(found)
        return Found(search, deltas)

    def _shares(self, run: _Run) -> list[tuple[int, ...]]:
        """What each process runs of the stream; empty where every one runs it all: alone, or of too few to measure.

        Raises:
            UserError: too few to train on.
        """
        sequences, count = run.stream.sequences, self.ranks.count
        if self.ranks.several and run.scale is not None and len(sequences) < count:
            raise UserError(
                f"stream {run.stream.name} has {len(sequences)} sequences in a micro-batch, fewer than the {count} "
                "processes; raise training.examples (or retain_examples), or start fewer processes"
            )
        if not self.ranks.several or len(sequences) < count:
            return []
        return self.ranks.shares([len(sequence) for sequence in sequences])

    def _take_sums(self, run: _Run) -> None:
        """The sums of terms that couple the sequences of a shared stream: not inside of a piece, which runs again where
        memory runs out, while the other processes go on.
        """
        for number, term in enumerate(run.stream.terms if run.shares else ()):
            sums = execution_of(term).first_pass(term, _FirstPass(self, run), None)
            if sums is not None:
                run.sums[number] = sums

    def _each_of_share(
        self,
        run: _Run,
        sequences: tuple[Sequence, ...],
        work: Callable[[Piece], T],
        members: Iterable[int] | None = None,
    ) -> Iterator[T]:
        """``_each_piece`` on this process's share. In lockstep all run as many pieces: one that has fewer runs some
        again, for nothing.
        """
        if not run.shares:
            yield from self._each_piece(run.stream, sequences, work, members)
            return
        own = run.shares[self.ranks.number]
        yield from self._each_piece(run.stream, sequences, work, own)
        if self.ranks.lockstep:
            size = self.levers.piece_size(run.stream.name)
            pieces = [len(split(sequences, size, self.layout, share)) for share in run.shares]
            shortest = min(own, key=lambda member: len(sequences[member]))
            for _ in range(max(pieces) - pieces[self.ranks.number]):
                with run.idle():
                    for _ in self._each_piece(run.stream, sequences, work, (shortest,)):
                        pass

    def _each_piece(
        self,
        stream: Stream,
        sequences: tuple[Sequence, ...],
        work: Callable[[Piece], T],
        members: Iterable[int] | None = None,
        prompts: tuple[int, ...] | None = None,
    ) -> Iterator[T]:
        """``work`` on each piece of the sequences, or of those ``members``, in turn, those of one of the ``prompts``
        together. Where memory runs out, what is left is cut anew.
        """
        waiting = split(sequences, self.levers.piece_size(stream.name), self.layout, members, prompts)
        while waiting:
            piece = make_piece(sequences, waiting[0], self.layout, self.device)
            result = attempt(partial(work, piece), self.device)
            if isinstance(result, OutOfMemory):
                passes = split(sequences, self.levers.piece_size(stream.name), self.layout, piece.members)
                self._retreat(stream, piece, max(map(len, passes)), result)
                left = [member for members in waiting for member in members]
                waiting = split(sequences, self.levers.piece_size(stream.name), self.layout, left, prompts)
            else:
                waiting.pop(0)
                yield result

    def _piece(self, run: _Run, piece: Piece) -> Meter:
        meter = Meter()
        meter.tokens = piece.tokens
        # A first pass that ran out of memory has moved the levers for the piece too.
        sums = [self._sums(run, piece, number) for number in range(len(run.stream.terms))]
        place = self._place(run.stream, piece, meter, run.found)
        executions = [execution_of(term)(term, place, known) for term, known in zip(run.stream.terms, sums)]
        with record_function(ranges.REFERENCE):
            reference_pass(place, executions)
        with lora_dropout(self.model, run.keys(piece)):
            with record_function(ranges.ADAPTED):
                loss = adapted_pass(place, executions)
            if run.scale is not None and loss.requires_grad:
                # Recomputed blocks run in here and draw their masks from the same keys.
                with fresh_gradients(self.parameters), record_function(ranges.BACKWARD):
                    (loss * run.scale).backward()
        # Only now: a piece that ran out of memory is cut anew, and its parts are not in the sums.
        run.sums = {number: execution.sums for number, execution in enumerate(executions)}
        return meter

    def _place(self, stream: Stream, piece: Piece, meter: Meter, found: Found | None = None) -> Place:
        return Place(self.parts, stream, piece, self.levers, meter, found.at(piece) if found else None)

    def _sums(self, run: _Run, piece: Piece, number: int) -> object:
        """What term ``number`` knows of the whole stream, where it is split."""
        known, kind = run.sums.get(number), execution_of(run.stream.terms[number])
        if known is not None or len(piece.members) == len(run.stream.sequences):
            return known
        sums = kind.first_pass(run.stream.terms[number], _FirstPass(self, run), piece)
        if not kind.sums_lack_piece:
            run.sums[number] = sums
        return sums

    def _retreat(self, stream: Stream, piece: Piece, count: int, failure: OutOfMemory) -> None:
        vocabulary = self.head.weight.shape[0] if self.head is not None else 0
        load = Load(stream.name, count, piece.positions, stream.head_rows(piece.members), vocabulary)
        if self.ranks.lockstep:
            raise UserError(
                f"out of memory ({load}): with distributed.shard=fsdp no process can do a piece again alone; resume "
                f"with memory.piece_tokens={max(1, piece.positions // 2)} or memory.checkpoint_blocks=all, or start "
                "more processes"
            )
        self.levers, change = retreat(self.levers, load, self.decoder.num_blocks, self.device)
        if self.on_out_of_memory:
            self.on_out_of_memory(f"out of memory ({load}): {change} from here on", failure.reason)


@dataclass
class _Run:
    """One call of ``backward``, or of ``measure`` where ``scale`` and ``seed`` are None.

    ``sums``: by number of the term, what its first pass has taken over the whole stream, once that is split. ``found``:
    its perturbation, where it has one. ``shares``: by process, the members that it runs; empty where this one runs them
    all.
    """

    stream: Stream
    scale: float | None = None
    seed: int | None = None
    sums: dict[int, object] = field(default_factory=dict)
    found: Found | None = None
    shares: list[tuple[int, ...]] = field(default_factory=list)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """What is done inside adds no gradient."""
        scale = self.scale
        self.scale = None if scale is None else 0.0
        try:
            yield
        finally:
            self.scale = scale

    def keys(self, piece: Piece) -> Tensor | None:
        """The dropout keys of a piece's rows; None = no dropout."""
        return None if self.seed is None else row_keys(piece, self.seed, self.stream.name)


class _FirstPass:
    """See :class:`~repbend_fast.step.terms.FirstPass`."""

    def __init__(self, runner: StreamRunner, run: _Run) -> None:
        self.parts, self.stream = runner.parts, run.stream
        self._runner, self._run = runner, run

    def each(
        self, sequences: tuple[Sequence, ...], work: Callable[[Piece], T], members: Iterable[int] | None = None
    ) -> Iterator[T]:
        return self._runner._each_of_share(self._run, sequences, work, members)

    def totals(self, tensors: Seq[Tensor]) -> list[Tensor]:
        return self._runner.ranks.totals(tensors)

    @contextmanager
    def sums(self, piece: Piece) -> Iterator[None]:
        with lora_dropout(self.parts.model, self._run.keys(piece)), record_function(ranges.SUMS), torch.no_grad():
            yield

    def visit(self, piece: Piece, then: Visit) -> Visit:
        return self._place(piece).visit(then)

    def reference(self, term: Term, piece: Piece) -> Execution[Term]:
        (execution,) = self._runner.compared((term,), self._place(piece))
        return execution

    def _place(self, piece: Piece) -> Place:
        return self._runner._place(self.stream, piece, Meter(), self._run.found)


def checked_runner(
    model: CausalLM, config: Config, levers: Levers, uses_head: bool, ranks: Ranks = ALONE
) -> StreamRunner:
    """The runner of a loaded model, prepared for it, under the recipe's autocast, with what passes take for granted
    shown on a few tokens.

    Where packing leaks between sequences and was not asked for, the runner pads. ``runner.prepared.restore()`` gives
    the model back. ``ranks`` in lockstep divide its blocks among them.

    Raises:
        UserError: the head is no plain matrix, or something does not hold (``step.proof``); the model is as before.
    """
    shards = resolve_device(config.model.device) if ranks.lockstep else None
    ready = prepared(model, levers, liger=config.model.liger, shards=shards)
    try:
        autocast = autocast_dtype(config, ready.device)
        runner = StreamRunner(ready, levers, autocast=autocast, uses_head=uses_head, ranks=ranks)
        runner.proof = prove_model(runner.parts, levers.packing, config.memory.packing)
    except BaseException:
        ready.restore()
        raise
    runner.levers = replace(levers, packing=runner.proof.packing)
    return runner
