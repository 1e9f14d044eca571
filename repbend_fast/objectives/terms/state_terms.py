"""Terms that compare hidden states: with the reference, with each other, or with their mean."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from repbend_fast.data.records import Sequence
from repbend_fast.objectives.terms.term import DISTANCE_KINDS, Span, Term, Unit, moved_states, rows_in, wrong_spans


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

    takes_shared: ClassVar[bool] = True

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
class BoundaryCosine(Term):
    """``weight × Σ_layers Σ_rows relu(ĥ·m_i) / denominator``, m_i the mean of the unit rows that the reference has in
    the sequence ``against[i]``: shorter than 1, and a constant to the gradient. ``rows``: as of a distance.
    """

    name: str
    layers: tuple[int, ...]
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    against: tuple[Sequence, ...]
    rows: float | None = None

    @property
    def compares_pairs(self) -> bool:
        return True

    def reference_state(self, num_blocks: int) -> int:
        return max(self.layers)

    def wrong(self, lengths: tuple[int, ...]) -> str | None:
        if len(self.against) != len(lengths):
            return f"term {self.name} has {len(self.against)} sequences to compare with for {len(lengths)} sequences"
        return super().wrong(lengths)


@dataclass(frozen=True)
class PairwiseCosine(Term):
    """``weight × mean_layers mean_{i≠j} (1 − cos(h_i, h_j))``, h_i the adapted state of sequence i at
    ``positions[i]``.
    """

    takes_shared: ClassVar[bool] = True

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
        return replace(self, layers=moved_states(self.layers, shift) or (top,)), 0


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
    ``unit`` "reference" ‖h − r‖ is divided by the hidden state's unit; of ``kind`` "cosine" it is d(h, r).
    """

    safe: Triplet
    unsafe: Triplet
    unit: Unit = "state"
    kind: Literal["l2", "cosine"] = "l2"

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
        return DISTANCE_KINDS[self.kind] if self.unit == "reference" and self.safe.weight else 0

    @property
    def halves(self) -> tuple[Triplet, Triplet]:
        """Safe, unsafe."""
        return self.safe, self.unsafe

    @property
    def parts(self) -> tuple[Triplet, Triplet]:
        return self.halves

    def with_parts(self, parts: tuple[Triplet, Triplet]) -> Triplets:
        return replace(self, safe=parts[0], unsafe=parts[1])

    def named(self, prefix: str, factor: float) -> Triplets:
        halves = (replace(half, name=prefix + half.name, weight=factor * half.weight) for half in self.halves)
        return self.with_parts((next(halves), next(halves)))

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
        kept = [moved_states(half.layers, shift) or (top,) for half in self.halves]
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
        return next(filter(None, (wrong_spans(half.name, half.spans, lengths) for half in self.halves)), None)
