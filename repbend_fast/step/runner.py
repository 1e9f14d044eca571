"""One stream of a training step: reference pass, adapted pass with taps, backward; then everything of it is freed.

Streams are additive, so finishing each before the next gives the same gradient with the largest stream's memory instead
of the sum. Terms that couple the sequences of a stream stay exact where it is split into pieces: their sums are taken
beforehand, and each piece then differentiates the exact derivative. For the same reason pieces of several streams may
share their passes: each term reads and taps the rows of its own piece. Such a batch, or a piece alone, is atomic: one
that runs out of memory leaves nothing behind and is done again in smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from repbend_fast import ranges
from repbend_fast.data.records import Sequence
from repbend_fast.distributed.ranks import ALONE, Ranks
from repbend_fast.errors import UserError
from repbend_fast.models.adapters import trainable_parameters
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import Decoder, Head, find_head
from repbend_fast.models.layers.lora import drops_out, lora_dropout
from repbend_fast.models.layers.truncated import Visit
from repbend_fast.models.surgery import Prepared
from repbend_fast.objectives.perturbed import Search
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Term
from repbend_fast.step.adapted import adapted_pass
from repbend_fast.step.dropout_keys import row_keys
from repbend_fast.step.levers import Levers
from repbend_fast.step.meter import Meter, StreamResult
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.pieces import Cut, Layout, Part, Piece, batches, make_pieces, shared_beginning, split
from repbend_fast.step.proof import Proof
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
        (result,) = self._run([_Run(stream, scale, dropout_seed)])
        return result

    def backward_all(self, streams: Seq[Stream], scale: float = 1.0, *, dropout_seed: int) -> list[StreamResult]:
        """``backward`` of the streams of one micro-batch, in passes that they share where the levers say so.

        Gradients and results are those of one stream after the other; so are the dropout masks. In lockstep every
        stream has its own: batches of several streams would not end at the same hidden state in each process.
        """
        if self.levers.merge_streams == "off" or self.ranks.lockstep:
            return [self.backward(stream, scale, dropout_seed=dropout_seed) for stream in streams]
        return self._run([_Run(stream, scale, dropout_seed) for stream in streams])

    @torch.no_grad()
    def measure(self, stream: Stream) -> StreamResult:
        """The same terms without dropout and without a gradient."""
        (result,) = self._run([_Run(stream)])
        return result

    @torch.no_grad()
    def reference_rows(self, stream: Stream) -> Iterator[list[dict[int, Tensor]]]:
        """The rows that the stream's terms compare with, piece by piece: of each term by hidden state."""

        def work(piece: Piece) -> list[dict[int, Tensor]]:
            return [execution.kept for execution in self.compared(stream.terms, self._place(stream, piece, Meter()))]

        yield from self.each_piece(stream, stream.sequences, work)

    def compared(self, terms: Iterable[Term], place: Place) -> list[Execution[Term]]:
        """The executions of ``terms`` behind a reference pass over a piece."""
        executions = [execution_of(term)(term, place) for term in terms]
        reference_pass(place, executions)
        return executions

    def _run(self, runs: list[_Run]) -> list[StreamResult]:
        for number, run in enumerate(runs):
            run.shares = self._shares(run, number)
            if run.stream.search is not None:
                run.found = self._search(run, run.stream.search)
            self._take_sums(run)
        for done in self._each_done(runs):
            for number, meter in done.items():
                runs[number].meter.merge(meter)
        for run in runs:
            if run.shares:
                run.meter.total(self.ranks)
        return [run.result(self.device) for run in runs]

    def _each_done(self, runs: Seq[_Run]) -> Iterator[dict[int, Meter]]:
        """What each batch of the runs measured, by number of the run, when it is done."""
        if len(runs) == 1:
            (run,) = runs
            yield from self._each_of_share(
                run, run.stream.sequences, lambda piece: self._batch(runs, {0: piece}), shares=run.shares_beginnings
            )
            return
        own = (run.shares[self.ranks.number] if run.shares else None for run in runs)
        sources = [
            Source(run.stream, run.stream.sequences, members, shares=run.shares_beginnings)
            for run, members in zip(runs, own)
        ]
        yield from self._each_batch(sources, partial(self._batch, runs))

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
            for found in self.each_piece(attacked, search.sequences, work, members, search.prompts):
                deltas.update(found)
        return Found(search, deltas)

    def _shares(self, run: _Run, number: int) -> list[tuple[int, ...]]:
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
        return self.ranks.shares([len(sequence) for sequence in sequences], number)

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
        *,
        shares: bool = False,
    ) -> Iterator[T]:
        """``each_piece`` on this process's share. In lockstep all run as many pieces: one that has fewer runs some
        again, for nothing.
        """
        if not run.shares:
            yield from self.each_piece(run.stream, sequences, work, members, shares=shares)
            return
        own = run.shares[self.ranks.number]
        yield from self.each_piece(run.stream, sequences, work, own, shares=shares)
        if self.ranks.lockstep:
            size = self.levers.piece_size(run.stream.name)
            pieces = [len(split(sequences, size, self.layout, share)) for share in run.shares]
            shortest = min(own, key=lambda member: len(sequences[member]))
            for _ in range(max(pieces) - pieces[self.ranks.number]):
                with run.idle():
                    for _ in self.each_piece(run.stream, sequences, work, (shortest,)):
                        pass

    def each_piece(
        self,
        stream: Stream,
        sequences: tuple[Sequence, ...],
        work: Callable[[Piece], T],
        members: Iterable[int] | None = None,
        prompts: tuple[int, ...] | None = None,
        *,
        shares: bool = False,
    ) -> Iterator[T]:
        """``work`` on each piece of the sequences, or of those ``members``, in turn, those of one of the ``prompts``
        together. Where memory runs out, what is left is cut anew. ``shares``: the sequences are the stream's own, whose
        terms alone read the piece, so that it may have a beginning once.
        """
        chosen = None if members is None else tuple(members)
        source = Source(stream, sequences, chosen, prompts, shares)
        yield from self._each_batch([source], lambda pieces: work(pieces[0]))

    def _each_batch(self, sources: Seq[Source], work: Callable[[dict[int, Piece]], T]) -> Iterator[T]:
        """``work`` on the pieces of each batch, by number of their source. Where memory runs out, what is left is cut
        anew.
        """
        waiting = self._cut(sources)
        while waiting:
            batch = waiting[0]
            parts = [(sources[cut.stream].sequences, cut.members) for cut in batch]
            shared = self._shared([(part, sources[cut.stream]) for part, cut in zip(parts, batch)])
            laid = make_pieces(parts, self.layout, self.device, shared)
            pieces = {cut.stream: piece for cut, piece in zip(batch, laid)}
            result = attempt(partial(work, pieces), self.device)
            if isinstance(result, OutOfMemory):
                self._retreat(sources, pieces, result)
                left: list[list[int]] = [[] for _ in sources]
                for cut in (cut for batch in waiting for cut in batch):
                    left[cut.stream] += cut.members
                waiting = self._cut([replace(source, members=tuple(m)) for source, m in zip(sources, left)])
            else:
                waiting.pop(0)
                yield result

    def _shared(self, parts: Seq[tuple[Part, Source]]) -> int:
        """First tokens that a batch has once for all of its sequences."""
        if self.levers.share_beginnings == "off" or self.layout != "packed" or self._drops_out:
            return 0
        if not all(source.shares for _, source in parts):
            return 0
        return shared_beginning([(part, source.stream.terms) for part, source in parts])

    @cached_property
    def _drops_out(self) -> bool:
        # Masks belong to a sequence and a position, so that what is shared would have others.
        return drops_out(self.model)

    def _cut(self, sources: Seq[Source]) -> list[list[Cut]]:
        """The batches of what the sources have, under the levers in force."""
        sizes = [self.levers.piece_size(source.stream.name) for source in sources]
        cuts = [
            Cut(number, members, tuple(len(source.sequences[m]) for m in members), size)
            for number, (source, size) in enumerate(zip(sources, sizes))
            for members in split(source.sequences, size, self.layout, source.members, source.prompts)
        ]
        return batches(cuts, self.layout, self.levers.merge_streams == "on")

    def _batch(self, runs: Seq[_Run], pieces: dict[int, Piece]) -> dict[int, Meter]:
        """Both passes over the pieces of one batch, by number of their run, and its backward; what they measured."""
        meters: dict[int, Meter] = {}
        executions: dict[int, list[Execution[Term]]] = {}
        # A first pass that ran out of memory has moved the levers for every piece of the batch.
        sums = {
            number: [self._sums(runs[number], piece, term) for term in range(len(runs[number].stream.terms))]
            for number, piece in pieces.items()
        }
        for number, piece in pieces.items():
            run, meters[number] = runs[number], Meter(piece.tokens)
            place = self._place(run.stream, piece, meters[number], run.found)
            executions[number] = [
                execution_of(term)(term, place, known) for term, known in zip(run.stream.terms, sums[number])
            ]
        every = [execution for found in executions.values() for execution in found]
        with record_function(ranges.REFERENCE):
            reference_pass(place, every)
        scale = runs[number].scale
        with lora_dropout(self.model, _keys(runs, pieces)):
            with record_function(ranges.ADAPTED):
                loss = adapted_pass(place, every)
            if scale is not None and loss.requires_grad:
                # Recomputed blocks run in here and draw their masks from the same keys.
                with fresh_gradients(self.parameters), record_function(ranges.BACKWARD):
                    (loss * scale).backward()
        # Only now: a piece that ran out of memory is cut anew, and its parts are not in the sums.
        for number, found in executions.items():
            runs[number].sums = {term: execution.sums for term, execution in enumerate(found)}
        return meters

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

    def _together(self, source: Source, piece: Piece) -> int:
        """Sequences of a piece that run together: a search cuts its own pieces further."""
        size = self.levers.piece_size(source.stream.name)
        return max(map(len, split(source.sequences, size, self.layout, piece.members)))

    def _retreat(self, sources: Seq[Source], pieces: dict[int, Piece], failure: OutOfMemory) -> None:
        vocabulary = self.head.weight.shape[0] if self.head is not None else 0
        streams = [sources[number].stream for number in pieces]
        load = Load(
            " and ".join(stream.name for stream in streams),
            sum(self._together(sources[number], piece) for number, piece in pieces.items()),
            sum(piece.positions for piece in pieces.values()),
            max(stream.head_rows(piece.members) for stream, piece in zip(streams, pieces.values())),
            vocabulary,
            streams=len(streams),
        )
        if self.ranks.lockstep:
            raise UserError(
                f"out of memory ({load}): with distributed.shard=fsdp no process can do a piece again alone; resume "
                f"with memory.piece_tokens={max(1, load.positions // 2)} or memory.checkpoint_blocks=all, or start "
                "more processes"
            )
        self.levers, change = retreat(self.levers, load, self.decoder.num_blocks, self.device)
        if self.on_out_of_memory:
            self.on_out_of_memory(f"out of memory ({load}): {change} from here on", failure.reason)


@dataclass(frozen=True)
class Source:
    """Sequences that are cut into pieces, or those ``members`` of them, under the levers of a stream; those of one of
    the ``prompts`` together. ``shares``: whether a piece may have their beginning once.
    """

    stream: Stream
    sequences: tuple[Sequence, ...]
    members: tuple[int, ...] | None = None
    prompts: tuple[int, ...] | None = None
    shares: bool = False


@dataclass
class _Run:
    """A stream in one call of ``backward``, or of ``measure`` where ``scale`` and ``seed`` are None.

    ``sums``: by number of the term, what its first pass has taken over the whole stream, once that is split. ``found``:
    its perturbation, where it has one. ``shares``: by process, the members that it runs; empty where this one runs them
    all. ``meter``: of the pieces that are done.
    """

    stream: Stream
    scale: float | None = None
    seed: int | None = None
    sums: dict[int, object] = field(default_factory=dict)
    found: Found | None = None
    shares: list[tuple[int, ...]] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)

    @property
    def shares_beginnings(self) -> bool:
        """Whether its pieces may have a beginning once: a perturbation is one of each sequence."""
        return self.stream.search is None

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

    def result(self, device: torch.device) -> StreamResult:
        """What the pieces say together."""
        tokens = sum(map(len, self.stream.sequences))
        result = StreamResult(torch.zeros((), device=device), tokens=tokens)
        for number, term in enumerate(self.stream.terms):
            execution_of(term).report(term, self.meter, result, self.sums.get(number))
        result.weigh(self.stream.weights)
        return result


def _keys(runs: Seq[_Run], pieces: dict[int, Piece]) -> Tensor | None:
    """The dropout keys of a batch's rows, each under its own stream's name; None without dropout, and where a beginning
    is shared, which it never is with it.
    """
    if any(piece.shared for piece in pieces.values()):
        return None
    found = [keys for number, piece in pieces.items() if (keys := runs[number].keys(piece)) is not None]
    return torch.cat(found) if found else None


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
