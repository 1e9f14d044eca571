"""Triplets around the mean unsafe state, exactly, whatever the stream is cut into.

At one hidden state, with m the mean over the N_u unsafe rows, x̂ = x/‖x‖, s(h) = cos(h, m), a_s and a_u weight / denominator:

    safe     v = ‖h − r‖/n − 1 + s(h) + p                ∂v/∂h = (h−r)/(n ‖h−r‖) + (m̂ − s ĥ)/‖h‖
    unsafe   v = cos(h, r) − s(h) + q                    ∂v/∂h = (r̂ − cos(h, r) ĥ)/‖h‖ − (m̂ − s ĥ)/‖h‖
    through m, every unsafe row                          (t − m̂ (m̂·t)) / (N_u ‖m‖),   t = a_s Σ ĥ_safe − a_u Σ ĥ_unsafe

over the rows with v > 0, n the hidden state's unit of length (1 in units of the state). Everything but a row's own state is m and t:
sums over rows. A stream in one piece has them at the tap; one in several takes them from a first pass without a gradient (from two,
where a margin is so small that v may be negative).

Legend: R rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from repbend_kernels.checks import accumulate_dtype
from repbend_kernels.row_distance import add_rows_torch
from repbend_kernels.rows import RowReader, blocks
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


@dataclass
class TripletSums:
    """Sums of one hidden state over the whole stream: Σ h over the unsafe rows, Σ ĥ over the active rows of each half, all [D]."""

    unsafe: Tensor
    units: tuple[Tensor, Tensor]

    def plus(self, other: TripletSums | None) -> TripletSums:
        """Both together."""
        if other is None:
            return self
        return TripletSums(self.unsafe + other.unsafe, (self.units[0] + other.units[0], self.units[1] + other.units[1]))


def _inverse(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, norm.reciprocal(), 0.0)


def _units(states: Tensor) -> tuple[Tensor, Tensor]:
    """``(ĥ [R, D], 1/‖h‖ [R, 1])``; a zero state stays zero."""
    inverse = _inverse(torch.linalg.vector_norm(states, dim=-1, keepdim=True))
    return states * inverse, inverse


class _Rows:
    """The rows of one half in one tensor, in blocks of the accumulating dtype."""

    def __init__(self, hidden: Tensor, rows: Tensor) -> None:
        self.reader, self.count, self.width = RowReader(hidden, rows), rows.shape[0], hidden.shape[-1]
        self.acc, self.device = accumulate_dtype(hidden.dtype), hidden.device

    def zeros(self) -> Tensor:
        """[D]."""
        return torch.zeros(self.width, dtype=self.acc, device=self.device)

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, rows)``."""
        for start, stop in blocks(self.count, self.width, self.device):
            yield start, stop, self.reader.read(start, stop).to(self.acc)

    def sums(self) -> tuple[Tensor, Tensor]:
        """``(Σ h, Σ ĥ)``."""
        total, units = self.zeros(), self.zeros()
        for _, _, h in self.blocks():
            total += h.sum(0)
            units += _units(h)[0].sum(0)
        return total, units


def _block(h: Tensor, r: Tensor, center: Tensor, margin: float, safe: bool, length: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(relu(v) [n], ∂v/∂h where v > 0 [n, D], Σ ĥ where v > 0 [D])``; ``center`` is m̂, ``length`` what counts as 1."""
    unit, inverse = _units(h)
    along = (unit @ center)[:, None]
    toward_m = (center - along * unit) * inverse
    if safe:
        difference = h - r
        norm = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
        value = norm / length - 1 + along + margin
        direction = difference * (_inverse(norm) / length) + toward_m
    else:
        unit_r, _ = _units(r)
        across = (unit * unit_r).sum(-1, keepdim=True)
        value = across - along + margin
        direction = (unit_r - across * unit) * inverse - toward_m
    active = value > 0
    return torch.relu(value).squeeze(1), direction * active, (unit * active).sum(0)


class _AddDirection(torch.autograd.Function):
    """Identity on ``hidden`` with a loss whose gradient at the rows is ``direction``."""

    @staticmethod
    def forward(ctx, hidden, direction, rows, loss):
        ctx.save_for_backward(direction, rows)
        ctx.shape = list(hidden.shape)
        ctx.set_materialize_grads(False)
        return hidden.view_as(hidden), loss.clone()

    @staticmethod
    def backward(ctx, grad_hidden, grad_loss):
        if grad_loss is None:
            return grad_hidden, None, None, None
        direction, rows = ctx.saved_tensors
        return add_rows_torch(grad_hidden, direction, rows, grad_loss, ctx.shape), None, None, None


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
    halves = [_Rows(hidden.detach(), part) for part in rows]
    shares = [half.weight / half.denominator if layer in half.layers else 0.0 for half in term.halves]
    unsafe_rows = max(1, sum(stop - start for start, stop in term.unsafe.spans))
    mean = (halves[1].sums()[0] if sums is None else sums.unsafe) / unsafe_rows
    length = torch.linalg.vector_norm(mean)
    center = mean * _inverse(length)
    directions = reference.split([rows[0].shape[0], rows[1].shape[0]])
    differentiate = hidden.requires_grad and torch.is_grad_enabled()
    largest, loss, units = max(*shares, 1e-30), halves[0].zeros().sum(), []
    for half, part, share, direction, safe in zip(term.halves, halves, shares, directions, (True, False), strict=True):
        value, active = half_value(part, direction, center, half.margin, safe, share / largest if differentiate else None, unit)
        units.append(active)
        if share:
            meter.add(half.name, value / half.denominator)
            loss = loss + value * (share / largest)
    if not differentiate:
        return hidden, loss * largest
    toward = [units[i] if sums is None else sums.units[i] for i in (0, 1)]
    pull = (toward[0] * shares[0] - toward[1] * shares[1]) / largest
    pull = (pull - center * (center @ pull)) * _inverse(length) / unsafe_rows
    # One row at a time in the accumulating dtype: the direction may have 16 bits.
    for start, stop in blocks(directions[1].shape[0], directions[1].shape[1], directions[1].device):
        directions[1][start:stop] = directions[1][start:stop].to(pull.dtype) + pull
    hidden, loss = _AddDirection.apply(hidden, reference, torch.cat(rows), loss)
    return hidden, loss * largest


def half_value(
    rows: _Rows, reference: Tensor, center: Tensor, margin: float, safe: bool, share: float | None, unit: float
) -> tuple[Tensor, Tensor]:
    """``(Σ relu(v), Σ ĥ over v > 0)``; with a ``share``, ``reference`` is overwritten with ``share`` · ∂v/∂h."""
    total, units = rows.zeros().sum(), rows.zeros()
    for start, stop, h in rows.blocks():
        value, direction, active = _block(h, reference[start:stop].to(h.dtype), center, margin, safe, unit)
        total = total + value.sum()
        units += active
        if share is not None:
            reference[start:stop] = direction * share
    return total, units


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
            safe, unsafe = (_Rows(hidden, part) for part in rows)
            if known is None or reference is None:
                total, units = unsafe.sums()
                found[layer] = TripletSums(total, (safe.sums()[1], units))
            else:
                unit = parts.unit(layer, term.unit_power)
                found[layer] = _active_sums(term, (safe, unsafe), reference[layer], known[layer], unit)
        return hidden

    with parts.autocasting():
        run_decoder(parts.decoder, piece.input_ids, position_ids=piece.position_ids, stop=max(term.layers), visit=visit)
    return found


def _active_sums(term: Triplets, halves: tuple[_Rows, _Rows], reference: Tensor, known: TripletSums, unit: float) -> TripletSums:
    """The unit sums of this piece's active rows; Σ h is in ``known`` already and stays 0 here."""
    center = known.unsafe * _inverse(torch.linalg.vector_norm(known.unsafe))
    parts = reference.split([halves[0].count, halves[1].count])
    safe, unsafe = (
        half_value(rows, part, center, half.margin, half is term.safe, None, unit)[1]
        for rows, part, half in zip(halves, parts, term.halves, strict=True)
    )
    return TripletSums(torch.zeros_like(known.unsafe), (safe, unsafe))
