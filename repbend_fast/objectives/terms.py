"""Terms of a loss as they are declared: what each reads, compares and weighs. How a kind is computed stands in
``step/terms``.

Nobody asks of what kind a term is. A kind of one's own is a frozen dataclass that derives from :class:`Term`, and its
execution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from repbend_fast.data.records import Sequence

Span = tuple[int, int]
"""Half-open range of positions of one sequence; (0, 0) selects nothing."""

Unit = Literal["state", "reference"]
"""What distances count in: the states' own length, or per hidden state the median norm of its reference
rows (``step/units.py``).
"""

DISTANCE_KINDS = {"l2": 1, "cosine": 0, "relu_cosine": 0, "mse": 2}
"""The kinds of distance, and the power of a length that each is; cosines have no unit."""

KL_BOUND = 1e-5  # nats per token: the KL's sums over the vocabulary round


def rows_in(spans: Iterable[Span]) -> int:
    """Positions in all."""
    return sum(stop - start for start, stop in spans)


class Term:
    """What any kind of term is asked. A kind has the fields that it needs and overrides what differs.

    ``layers``: the hidden states that it taps, () for a term of the head alone. ``spans``: the rows that it reads, one
    span per sequence. ``reads_head``: whether it reads the last hidden state for the logits.
    """

    reads_head: ClassVar[bool] = False

    if TYPE_CHECKING:  # fields of the kinds

        @property
        def name(self) -> str: ...
        @property
        def weight(self) -> float: ...
        @property
        def spans(self) -> tuple[Span, ...]: ...
        @property
        def layers(self) -> tuple[int, ...]: ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the values that it reports."""
        return (self.name,)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each of its values in the loss, by name."""
        return {self.name: self.weight}

    @property
    def parts(self) -> tuple[Any, ...]:
        """What is divided by a denominator of its own: the term, or its halves; nothing for a mean over the micro-batch
        alone.
        """
        return (self,)

    def with_parts(self, parts: tuple[Any, ...]) -> Term:
        """The term with other ``parts``."""
        return parts[0]

    @property
    def divides(self) -> bool:
        """Whether the denominator is the term's own: one without rows has 1, to divide by."""
        return rows_in(self.spans) > 0

    @property
    def compared_layers(self) -> tuple[int, ...]:
        """Hidden states of which it keeps rows of the reference."""
        return ()

    @property
    def compares_head(self) -> bool:
        """Whether it reads the last hidden state with the adapter off."""
        return False

    def read_states(self, num_blocks: int) -> set[int]:
        """Hidden states that it reads in the adapted pass; the head reads the last."""
        return {*self.layers, *((num_blocks,) if self.reads_head else ())}

    def compared_states(self, num_blocks: int) -> set[int]:
        """Hidden states that it reads with the adapter off."""
        return {*self.compared_layers, *((num_blocks,) if self.compares_head else ())}

    @property
    def compares_pairs(self) -> bool:
        """Whether the halves of pairs are compared with each other."""
        return False

    @property
    def compared_spans(self) -> tuple[Span, ...]:
        """Rows of which each of ``compared_layers`` keeps the reference, as a memory plan counts them."""
        return self.spans if self.compared_layers else ()

    def rows_of(self, members: Iterable[int] | None = None) -> int:
        """Rows that it reads, of these sequences or of all."""
        return rows_in(self.spans if members is None else (self.spans[member] for member in members))

    def moved(self, shift: int, top: int) -> tuple[Self | None, int]:
        """The term as the top blocks of a model see it, and how many (rows × hidden states) of references were cut
        away.

        Hidden states move down by ``shift`` to at most ``top``, those of the blocks below are left out; None where none
        is left.
        """
        kept = _moved(self.layers, shift)
        cut = rows_in(self.compared_spans) * (len(self.compared_layers) - len(_moved(self.compared_layers, shift)))
        return (None, cut) if self.layers and not kept else (replace(self, layers=kept) if self.layers else self, cut)  # type: ignore[type-var]

    @property
    def start_bound(self) -> float | None:
        """The most that its value may be while the adapter changes nothing; None where the value does not tell."""
        return None

    @property
    def described(self) -> str:
        """What an error calls it."""
        return f"term {self.name}"

    def start_probes(self, num_blocks: int) -> tuple[Distance, ...]:
        """l2 distances on the rows that it compares with the reference, where its own value hides a difference."""
        return ()

    def unit_rows(self, known: Collection[int]) -> tuple[Distance, ...]:
        """Distances whose reference rows have the norms that it counts in, at hidden states whose unit is not
        ``known``.
        """
        return ()

    def wrong(self, lengths: tuple[int, ...]) -> str | None:
        """What does not fit sequences of these lengths, in words."""
        return _wrong_spans(self.name, self.spans, lengths)


def _moved(layers: tuple[int, ...], shift: int) -> tuple[int, ...]:
    return tuple(layer - shift for layer in layers if layer > shift)


def _wrong_spans(name: str, spans: tuple[Span, ...], lengths: tuple[int, ...]) -> str | None:
    if len(spans) != len(lengths):
        return f"term {name} has {len(spans)} spans for {len(lengths)} sequences"
    for (start, stop), length in zip(spans, lengths):
        if not 0 <= start <= stop <= length:
            return f"term {name} has the span ({start}, {stop}) in a sequence of {length} tokens"
    return None


@dataclass(frozen=True)
class Direction:
    """A fixed row c·u: u drawn from U[0, 1)^D with ``seed`` and normalised, c = ``length`` in its term's unit."""

    seed: int
    length: float


@dataclass(frozen=True)
class Distance(Term):
    """``weight × Σ_layers Σ_rows distance(h, r) / denominator``, the rows being ``spans`` of the stream's sequences.

    ``r`` is the same row with the trained adapter off. Where ``against[i]`` is a sequence, rows after the prompt they
    share are compared with that sequence's row at the same position instead. With a ``target`` it is r for every row,
    and no reference is run for the term. With a ``limit`` (l2) no row counts for more than ``limit`` × ‖r‖, nor moves
    beyond. ``rows``: what the reported mean per hidden state divides by; None = the rows of ``spans``.
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
        return DISTANCE_KINDS[self.kind] if self.unit == "reference" else 0

    @property
    def compared_layers(self) -> tuple[int, ...]:
        return () if self.target else self.layers

    @property
    def compares_pairs(self) -> bool:
        return self.against is not None

    @property
    def start_bound(self) -> float | None:
        # Cosines hide a difference: their gradient is not 0 where it is.
        return 0.0 if self._compares_itself and DISTANCE_KINDS[self.kind] else None

    @property
    def _compares_itself(self) -> bool:
        return self.target is None and self.against is None

    @property
    def described(self) -> str:
        return f"distance {self.name}"

    def start_probes(self, num_blocks: int) -> tuple[Distance, ...]:
        if not self._compares_itself or self.start_bound is not None:
            return ()
        return (Distance(self.name, self.layers, self.spans, 1.0, 1.0),)

    def unit_rows(self, known: Collection[int]) -> tuple[Distance, ...]:
        layers = tuple(layer for layer in self.layers if layer not in known)
        # A fixed target is no reference row, so such a term reads the model's own rows here.
        return (replace(self, layers=layers, target=None),) if self.unit_power and layers else ()

    def wrong(self, lengths: tuple[int, ...]) -> str | None:
        if self.kind not in DISTANCE_KINDS:
            return f"term {self.name} is of kind {self.kind!r}; there are {', '.join(DISTANCE_KINDS)}"
        if self.limit is not None and self.kind != "l2":
            return f"term {self.name} has a limit, which only kind 'l2' can have"
        if self.against is not None and len(self.against) != len(lengths):
            return f"term {self.name} has {len(self.against)} sequences to compare with for {len(lengths)} sequences"
        return super().wrong(lengths)


@dataclass(frozen=True)
class PairwiseCosine(Term):
    """``weight × mean_layers mean_{i≠j} (1 − cos(h_i, h_j))``, h_i the adapted state of sequence i at
    ``positions[i]``.
    """

    name: str
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    weight: float

    @property
    def spans(self) -> tuple[Span, ...]:
        """The one position of each sequence that the term reads."""
        return tuple((p, p + 1) for p in self.positions)

    @property
    def parts(self) -> tuple[()]:
        return ()

    def with_parts(self, parts: tuple[object, ...]) -> PairwiseCosine:
        return self

    def moved(self, shift: int, top: int) -> tuple[PairwiseCosine, int]:
        return replace(self, layers=_moved(self.layers, shift) or (top,)), 0


@dataclass(frozen=True)
class Triplet:
    """One half of :class:`Triplets`: ``weight × Σ_layers Σ_rows relu(triplet + margin) / denominator``."""

    name: str
    layers: tuple[int, ...]
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    margin: float

    @property
    def divides(self) -> bool:
        """As of a term."""
        return rows_in(self.spans) > 0


@dataclass(frozen=True)
class Triplets(Term):
    """Triplets around m_l, the mean over the ``unsafe`` rows of adapted hidden state l, which is differentiated
    through.

        safe     relu(‖h − r‖ − d(h, m_l) + margin)
        unsafe   relu(d(h, m_l) − d(h, r) + margin)          d = 1 − cos

    ``unsafe.spans`` are the rows of m_l at every layer of either half, also where ``unsafe`` itself has no weight. With
    ``unit`` "reference" ‖h − r‖ is divided by the hidden state's unit.
    """

    safe: Triplet
    unsafe: Triplet
    unit: Unit = "state"

    @property
    def name(self) -> str:
        """Of both halves together."""
        return f"{self.safe.name} and {self.unsafe.name}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(half.name for half in self.halves)

    @property
    def weights(self) -> dict[str, float]:
        return {half.name: half.weight for half in self.halves}

    @property
    def unit_power(self) -> int:
        """As of a distance; without a weight the safe half, which alone has lengths, may have no rows to measure."""
        return 1 if self.unit == "reference" and self.safe.weight else 0

    @property
    def halves(self) -> tuple[Triplet, Triplet]:
        """Safe, unsafe."""
        return self.safe, self.unsafe

    @property
    def parts(self) -> tuple[Triplet, Triplet]:
        return self.halves

    def with_parts(self, parts: tuple[Triplet, Triplet]) -> Triplets:
        return replace(self, safe=parts[0], unsafe=parts[1])

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states of either half, in order."""
        return tuple(sorted({*self.safe.layers, *self.unsafe.layers}))

    @property
    def compared_layers(self) -> tuple[int, ...]:
        return self.layers

    @property
    def compared_spans(self) -> tuple[Span, ...]:
        return ()  # a plan takes the halves' rows as they come in its pieces

    def rows_of(self, members: Iterable[int] | None = None) -> int:
        chosen = None if members is None else tuple(members)
        return sum(rows_in(half.spans if chosen is None else (half.spans[m] for m in chosen)) for half in self.halves)

    def moved(self, shift: int, top: int) -> tuple[Triplets, int]:
        kept = [_moved(half.layers, shift) or (top,) for half in self.halves]
        cut = sum(rows_in(half.spans) * (len(half.layers) - len(layers)) for half, layers in zip(self.halves, kept))
        safe, unsafe = (replace(half, layers=layers) for half, layers in zip(self.halves, kept))
        return replace(self, safe=safe, unsafe=unsafe), cut

    def start_probes(self, num_blocks: int) -> tuple[Distance, ...]:
        return tuple(Distance(half.name, half.layers, half.spans, 1.0, 1.0) for half in self.halves if half.layers)

    def unit_rows(self, known: Collection[int]) -> tuple[Distance, ...]:
        if not self.unit_power or set(self.safe.layers) <= set(known):
            return ()
        layers = tuple(layer for layer in self.layers if layer not in known)
        return (Distance(self.safe.name, layers, self.safe.spans, 1.0, 1.0, unit=self.unit),)

    def wrong(self, lengths: tuple[int, ...]) -> str | None:
        return next(filter(None, (_wrong_spans(half.name, half.spans, lengths) for half in self.halves)), None)


class HeadTerm(Term):
    """A term that reads the logits of the frozen head."""

    reads_head: ClassVar[bool] = True
    layers: ClassVar[tuple[int, ...]] = ()

    def start_probes(self, num_blocks: int) -> tuple[Distance, ...]:
        return (Distance(self.name, (num_blocks,), self.spans, 1.0, 1.0),) if self.compares_head else ()


@dataclass(frozen=True)
class HeadKL(HeadTerm):
    """``weight × T² Σ_rows KL(softmax(z_r/T) ‖ softmax(z/T)) / denominator`` on logits of the frozen head."""

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    temperature: float

    @property
    def compares_head(self) -> bool:
        return True

    @property
    def start_bound(self) -> float | None:
        return KL_BOUND

    @property
    def described(self) -> str:
        return f"KL of {self.name}"


@dataclass(frozen=True)
class AnswerLoss(HeadTerm):
    """Negative log-likelihood of the tokens that follow the rows ``spans``: NLL_i = −Σ_rows log p(next token) of
    sequence i.

    ``weight × Σ_i NLL_i / denominator``, or with ``beta`` negative preference,
    ``weight × Σ_i −(2/β) log σ(β (NLL_i − NLL_ref,i)) / denominator``. Only the latter needs a reference.
    """

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    beta: float | None = None

    @property
    def compares_head(self) -> bool:
        return self.beta is not None

    @property
    def divides(self) -> bool:
        # Preference has a value without rows too.
        return bool(self.spans) if self.beta is not None else super().divides


@dataclass(frozen=True)
class SimplePreference(HeadTerm):
    """``weight × Σ_i −(2/β) log σ(β (NLL_i / |y_i| − δ)) / denominator``: negative preference per token, without a
    reference.
    """

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    beta: float
    delta: float

    @property
    def divides(self) -> bool:
        # It has a value without rows too.
        return bool(self.spans)


@dataclass(frozen=True)
class WeightedAscent(HeadTerm):
    """``weight × Σ_rows p^power (1 − p)^rest_power log p / denominator``, p the probability of the next token; its
    powers are constants to the gradient. Minimised, it makes those tokens unlikely.
    """

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    power: float
    rest_power: float
