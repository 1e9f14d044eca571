"""Triplets around the mean unsafe state of a stream, exactly, whatever the stream is cut into
(``repbend_kernels.triplet_tap``).

A stream in one piece has the sums that its triplets share at the tap; one in several takes them from a first pass
without a gradient (from two, where a margin is so small that v may be negative).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import repbend_kernels
import torch
from repbend_kernels import TripletSums
from torch import Tensor

from repbend_fast.models.decoder import run_decoder
from repbend_fast.objectives.terms import Triplets, rows_in
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.pieces import Piece
from repbend_fast.step.terms.execution import Execution, FirstPass, Place, executes

# Two cosine distances differ by at most this much. With a margin of it or more no triplet is ever inactive, but for the
# one opposite to m, whose part in t is projected out.
WIDEST = 2.0

Sums = dict[int, TripletSums]
"""By hidden state."""


@executes(Triplets)
class TripletsExecution(Execution[Triplets]):
    """``kept`` holds safe rows, then unsafe ones, and is used up: the op overwrites it with the direction of the
    gradient.
    """

    def __init__(self, term: Triplets, place: Place, sums: Sums | None = None) -> None:
        super().__init__(term, place, sums)
        self._halves: tuple[Tensor, Tensor] | None = triplet_rows(term, place.piece)
        self._both: Tensor | None = None
        self._losses: list[Tensor] = []

    @classmethod
    def first_pass(cls, term: Triplets, first: FirstPass, piece: Piece | None) -> Sums:
        def work(part: Piece, known: Sums | None = None) -> Sums:
            rows = first.reference(term, part).kept if known else None
            with first.sums(part):
                return triplet_sums(first, term, part, known, rows)

        everything = total_sums(first, first.each(first.stream.sequences, work))
        if always_active(term):
            return everything
        again = partial(work, known=everything)
        return only_active(everything, total_sums(first, first.each(first.stream.sequences, again)))

    def keep(self, layer: int, hidden: Tensor) -> None:
        if self._both is None:
            assert self._halves is not None
            self._both = torch.cat(self._halves)
        self.kept[layer] = hidden.reshape(-1, hidden.shape[-1])[self._both]

    def compare(self) -> None:
        self._both = None

    def tap(self, layer: int, hidden: Tensor) -> Tensor:
        term, place = self.term, self.place
        shares = [half.weight / half.denominator if layer in half.layers else 0.0 for half in term.halves]
        safe, unsafe = term.halves
        assert self._halves is not None
        hidden, loss, values = repbend_kernels.triplet_tap(
            hidden,
            self.kept.pop(layer),
            self._halves,
            weights=(shares[0], shares[1]),
            margins=(safe.margin, unsafe.margin),
            unit=unit_of(place.parts, term, layer),
            unsafe_rows=rows_in(unsafe.spans),
            sums=None if self.sums is None else self.sums[layer],
        )
        for half, share, value in zip(term.halves, shares, values, strict=True):
            if share:
                place.meter.add(half.name, value / half.denominator)
        self._losses.append(loss)
        return hidden

    def release(self) -> None:
        self._halves = None

    def losses(self) -> list[Tensor]:
        found, self._losses = self._losses, []
        return found


def always_active(term: Triplets) -> bool:
    """Whether every triplet counts, whatever the states are."""
    return all(half.margin >= WIDEST for half in term.halves if half.weight)


def unit_of(parts: ModelParts, term: Triplets, layer: int) -> float | None:
    """What counts as 1 of the safe distance; None where that is a cosine's."""
    return None if term.kind == "cosine" else parts.unit(layer, term.unit_power)


def triplet_rows(term: Triplets, piece: Piece) -> tuple[Tensor, Tensor]:
    """Flat rows of the safe and the unsafe half in a piece, int64."""
    return piece.rows(term.safe.spans), piece.rows(term.unsafe.spans)


def total_sums(first: FirstPass, pieces: Iterable[Sums]) -> Sums:
    """The sums of all pieces together, of all processes."""
    total: Sums = {}
    for sums in pieces:
        total = {layer: found.plus(total.get(layer)) for layer, found in sums.items()}
    found = iter(first.totals([t for _, sums in sorted(total.items()) for t in (sums.unsafe, *sums.units)]))
    return {layer: TripletSums(next(found), (next(found), next(found))) for layer in sorted(total)}


def only_active(everything: Sums, active: Sums) -> Sums:
    """Σ h of the one with the unit sums of the other."""
    return {layer: TripletSums(sums.unsafe, active[layer].units) for layer, sums in everything.items()}


def triplet_sums(
    first: FirstPass,
    term: Triplets,
    piece: Piece,
    known: Sums | None = None,
    reference: Mapping[int, Tensor] | None = None,
) -> Sums:
    """The sums over one piece, by hidden state; LoRA dropout is the caller's, as in the piece's adapted pass.

    Args:
        known: sums over the whole stream with every row counted as active; then, with the ``reference`` rows of the
            piece, only the rows that are active count.
    """
    parts, rows = first.parts, triplet_rows(term, piece)
    found: Sums = {}

    def visit(layer: int, hidden: Tensor) -> Tensor:
        if layer in term.layers:
            if known is None or reference is None:
                found[layer] = repbend_kernels.triplet_sums(hidden, rows)
            else:
                safe, unsafe = term.halves
                found[layer] = repbend_kernels.triplet_sums(
                    hidden,
                    rows,
                    known=known[layer],
                    reference=reference[layer],
                    margins=(safe.margin, unsafe.margin),
                    unit=unit_of(parts, term, layer),
                )
        return hidden

    with parts.autocasting():
        run_decoder(
            parts.decoder,
            piece.input_ids,
            packed=piece.packed,
            stop=max(term.layers),
            visit=first.visit(piece, visit),
        )
    return found
