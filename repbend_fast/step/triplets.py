"""Triplets around the mean unsafe state of a stream, exactly, whatever the stream is cut into (``repbend_kernels.triplet_tap``).

A stream in one piece has the sums that its triplets share at the tap; one in several takes them from a first pass without a gradient
(from two, where a margin is so small that v may be negative).
"""

from __future__ import annotations

from collections.abc import Iterable

import repbend_kernels
import torch
from repbend_kernels import TripletSums
from torch import Tensor

from repbend_fast.models.decoder import run_decoder
from repbend_fast.objectives.base import Triplets
from repbend_fast.step.meter import Meter
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.pieces import Piece

# Two cosine distances differ by at most this much. With a margin of it or more no triplet is ever inactive, but for the one
# opposite to m, whose part in t is projected out.
WIDEST = 2.0


def always_active(term: Triplets) -> bool:
    """Whether every triplet counts, whatever the states are."""
    return all(half.margin >= WIDEST for half in term.halves if half.weight)


def triplet_rows(term: Triplets, piece: Piece) -> tuple[Tensor, Tensor]:
    """Flat rows of the safe and the unsafe half in a piece, int64."""
    return piece.rows(term.safe.spans), piece.rows(term.unsafe.spans)


def triplet_tap(
    term: Triplets,
    layer: int,
    hidden: Tensor,
    reference: Tensor,
    rows: tuple[Tensor, Tensor],
    sums: TripletSums | None,
    meter: Meter,
    unit: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Read the triplets of one hidden state and put their gradient in at this place.

    Args:
        hidden: [..., D]; the returned one takes its place.
        reference: [R_safe + R_unsafe, D], the same rows with the adapter off; overwritten with the direction of the gradient.
        rows: flat rows of both halves.
        sums: over the whole stream; None where these rows are all of it.
        meter: receives the value of both halves.
        unit: the length that counts as 1 at this hidden state.

    Returns:
        ``(hidden, loss)``, the loss weighted, in float32 (float64 for float64).
    """
    shares = [half.weight / half.denominator if layer in half.layers else 0.0 for half in term.halves]
    safe, unsafe = term.halves
    hidden, loss, values = repbend_kernels.triplet_tap(
        hidden,
        reference,
        rows,
        weights=(shares[0], shares[1]),
        margins=(safe.margin, unsafe.margin),
        unit=unit,
        unsafe_rows=sum(stop - start for start, stop in unsafe.spans),
        sums=sums,
    )
    for half, share, value in zip(term.halves, shares, values, strict=True):
        if share:
            meter.add(half.name, value / half.denominator)
    return hidden, loss


def total_sums(pieces: Iterable[dict[int, TripletSums]]) -> dict[int, TripletSums]:
    """The sums of all pieces together."""
    total: dict[int, TripletSums] = {}
    for sums in pieces:
        total = {layer: found.plus(total.get(layer)) for layer, found in sums.items()}
    return total


def only_active(everything: dict[int, TripletSums], active: dict[int, TripletSums]) -> dict[int, TripletSums]:
    """Σ h of the one with the unit sums of the other."""
    return {layer: TripletSums(sums.unsafe, active[layer].units) for layer, sums in everything.items()}


@torch.no_grad()
def triplet_sums(
    parts: ModelParts, term: Triplets, piece: Piece, known: dict[int, TripletSums] | None = None, reference: dict[int, Tensor] | None = None
) -> dict[int, TripletSums]:
    """The sums over one piece, by hidden state; LoRA dropout is the caller's, as in the piece's adapted pass.

    Args:
        known: sums over the whole stream with every row counted as active; then, with the ``reference`` rows of the piece, only
            the rows that are active count.
    """
    rows, found = triplet_rows(term, piece), {}

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
                    unit=parts.unit(layer, term.unit_power),
                )
        return hidden

    with parts.autocasting():
        run_decoder(parts.decoder, piece.input_ids, position_ids=piece.position_ids, stop=max(term.layers), visit=visit)
    return found
