"""What an objective says: which streams, rows, layers, distances and weights. How they are computed is ``step``'s business.

The total loss is a sum over streams, so each stream is run and differentiated on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from repbend_fast.data.records import Batch, Role, Sequence

Span = tuple[int, int]
"""Half-open range of positions of one sequence; (0, 0) selects nothing."""

Unit = Literal["state", "reference"]
"""What distances count in: the states' own length, or per hidden state the median norm of its reference rows (``step/units.py``)."""

UNIT_POWER = {"l2": 1, "mse": 2}
"""The power of a length that a kind of distance is; cosines have no unit."""


@dataclass(frozen=True)
class Direction:
    """A fixed row c·u: u drawn from U[0, 1)^D with ``seed`` and normalised, c = ``length`` in its term's unit."""

    seed: int
    length: float


@dataclass(frozen=True)
class Distance:
    """``weight × Σ_layers Σ_rows distance(h, r) / denominator``, the rows being ``spans`` of the stream's sequences.

    ``r`` is the same row with the trained adapter off. Where ``against[i]`` is a sequence, rows after the prompt they share
    are compared with that sequence's row at the same position instead. With a ``target`` it is r for every row, and no
    reference is run for the term. With a ``limit`` (l2) no row counts for more than ``limit`` × ‖r‖, nor moves beyond.
    ``rows``: what the reported mean per hidden state divides by; None = the rows of ``spans``.
    With ``unit`` "reference" an l2 distance is divided by its hidden state's unit, an mse by the unit's square.
    """

    name: str
    layers: tuple[int, ...]
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    kind: str = "l2"
    limit: float | None = None
    against: tuple[Sequence | None, ...] | None = None
    target: Direction | None = None
    rows: float | None = None
    unit: Unit = "state"

    @property
    def unit_power(self) -> int:
        """The power of the hidden state's unit that the distance is divided by."""
        return UNIT_POWER.get(self.kind, 0) if self.unit == "reference" else 0


@dataclass(frozen=True)
class PairwiseCosine:
    """``weight × mean_layers mean_{i≠j} (1 − cos(h_i, h_j))``, h_i the adapted state of sequence i at ``positions[i]``."""

    name: str
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    weight: float


@dataclass(frozen=True)
class Triplet:
    """One half of :class:`Triplets`: ``weight × Σ_layers Σ_rows relu(triplet + margin) / denominator``."""

    name: str
    layers: tuple[int, ...]
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    margin: float


@dataclass(frozen=True)
class Triplets:
    """Triplets around m_l, the mean over the ``unsafe`` rows of adapted hidden state l, which is differentiated through.

        safe     relu(‖h − r‖ − d(h, m_l) + margin)
        unsafe   relu(d(h, m_l) − d(h, r) + margin)          d = 1 − cos

    ``unsafe.spans`` are the rows of m_l at every layer of either half, also where ``unsafe`` itself has no weight. With ``unit``
    "reference" ‖h − r‖ is divided by the hidden state's unit.
    """

    safe: Triplet
    unsafe: Triplet
    unit: Unit = "state"

    @property
    def unit_power(self) -> int:
        """As of a distance; without a weight the safe half, which alone has lengths, may have no rows to measure."""
        return 1 if self.unit == "reference" and self.safe.weight else 0

    @property
    def halves(self) -> tuple[Triplet, Triplet]:
        """Safe, unsafe."""
        return self.safe, self.unsafe

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states of either half, in order."""
        return tuple(sorted({*self.safe.layers, *self.unsafe.layers}))


@dataclass(frozen=True)
class HeadKL:
    """``weight × T² Σ_rows KL(softmax(z_r/T) ‖ softmax(z/T)) / denominator`` on logits of the frozen head."""

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    temperature: float


@dataclass(frozen=True)
class AnswerLoss:
    """Negative log-likelihood of the tokens that follow the rows ``spans``: NLL_i = −Σ_rows log p(next token) of sequence i.

    ``weight × Σ_i NLL_i / denominator``, or with ``beta`` negative preference,
    ``weight × Σ_i −(2/β) log σ(β (NLL_i − NLL_ref,i)) / denominator``. Only the latter needs a reference.
    """

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    beta: float | None = None


@dataclass(frozen=True)
class Stream:
    """One batch with one role and the loss terms read from it."""

    name: str
    sequences: tuple[Sequence, ...]
    distances: tuple[Distance, ...] = ()
    pairwise: PairwiseCosine | None = None
    head: HeadKL | None = None
    triplets: Triplets | None = None
    answers: AnswerLoss | None = None
    layers: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        needed = {layer for term in self.distances for layer in term.layers}
        if self.pairwise:
            needed.update(self.pairwise.layers)
        if self.triplets:
            needed.update(self.triplets.layers)
        object.__setattr__(self, "layers", tuple(sorted(needed)))

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term in the total loss, by name."""
        terms = (*self.distances, self.pairwise, self.head, *(self.triplets.halves if self.triplets else ()), self.answers)
        return {t.name: t.weight for t in terms if t is not None and t.weight}

    def stop(self, num_blocks: int) -> int:
        """Last hidden state that the passes of this stream must reach."""
        return num_blocks if self.head or self.answers else max(self.layers)

    def reference_stop(self, num_blocks: int) -> int:
        """Last hidden state that a term compares with the adapter off; 0 where none does, and no reference pass runs."""
        if self.head or (self.answers and self.answers.beta is not None):
            return num_blocks
        compared = [max(term.layers) for term in self.distances if term.target is None]
        return max((*compared, *(self.triplets.layers if self.triplets else ())), default=0)


class Objective(Protocol):
    """An objective turns a batch into streams. ``step`` counts from 0, for scheduled weights.

    ``roles``: the records that a batch must hold. ``uses_head``: whether a term reads logits. ``last_state``: the last hidden
    state that the adapter has to reach.
    """

    roles: tuple[Role, ...]
    uses_head: bool
    last_state: int

    def streams(self, batch: Batch, step: int) -> list[Stream]: ...

    def probes(self, batch: Batch) -> list[Stream]:
        """Streams of l2 distances alone, of which the guard reports the means: what is bent first, what is kept second."""
        ...


def forget_sequences(batch: Batch) -> tuple[Sequence, ...]:
    """What the methods with a forget set forget: the unsafe conversations, and the unsafe halves of the pairs."""
    return (*batch.unsafe, *(pair.unsafe for pair in batch.pairs))


def all_rows(sequences: tuple[Sequence, ...]) -> tuple[Span, ...]:
    """Every position."""
    return tuple((0, len(s)) for s in sequences)


def answer_rows(sequences: tuple[Sequence, ...]) -> tuple[Span, ...]:
    """The positions of the answers."""
    return tuple((s.prompt_length, len(s)) for s in sequences)


def select_rows(sequence: Sequence, loss_mode: str) -> Span:
    """The positions of one sequence that ``loss_mode`` selects."""
    prompt, total = sequence.prompt_length, len(sequence)
    return {
        "prompt_last": (prompt - 1, prompt),
        "prompt_all": (0, prompt),
        "prompt_response": (0, total),
        "response_all": (prompt, total),
    }[loss_mode]


def mode_rows(sequences: tuple[Sequence, ...], loss_mode: str) -> tuple[Span, ...]:
    """``select_rows`` of each sequence."""
    return tuple(select_rows(s, loss_mode) for s in sequences)


def predicting_rows(sequences: tuple[Sequence, ...]) -> tuple[Span, ...]:
    """The positions whose logits predict the answers' tokens; in a conversation without a prompt every token but the first."""
    return tuple((max(s.prompt_length - 1, 0), max(len(s) - 1, 0)) for s in sequences)


def count(spans: tuple[Span, ...]) -> int:
    """Rows in all, at least 1, to divide by."""
    return max(1, sum(stop - start for start, stop in spans))


def padded_count(sequences: tuple[Sequence, ...], length: int | None) -> int:
    """Positions of a batch padded to ``length``, or to its longest sequence: what a mean over padding divides by."""
    return max(1, len(sequences) * max([length or 0, *(len(s) for s in sequences)]))


def l2_probe(name: str, sequences: tuple[Sequence, ...], layers: tuple[int, ...], unit: Unit = "state") -> Iterator[Stream]:
    """A stream of mean l2 distances over the answers' rows, where there are any sequences."""
    if sequences:
        spans = answer_rows(sequences)
        yield Stream(name, sequences, (Distance(name, layers, spans, 1.0, count(spans) * len(layers), unit=unit),))
