"""``triplet_tap``: read triplets around the mean unsafe state and put their gradient in at this place, exactly for a
part of a batch too.

At one hidden state, with m the mean over the N_u unsafe rows, x̂ = x/‖x‖, s(h) = cos(h, m), a_s and a_u the halves'
weights:

    safe     v = ‖h − r‖/n − 1 + s(h) + p                ∂v/∂h = (h−r)/(n ‖h−r‖) + (m̂ − s ĥ)/‖h‖
      cosine v = s(h) − cos(h, r) + p                    ∂v/∂h = (m̂ − s ĥ)/‖h‖ − (r̂ − cos(h, r) ĥ)/‖h‖
    unsafe   v = cos(h, r) − s(h) + q                    ∂v/∂h = (r̂ − cos(h, r) ĥ)/‖h‖ − (m̂ − s ĥ)/‖h‖
    through m, every unsafe row                          (t − m̂ (m̂·t)) / (N_u ‖m‖),   t = a_s Σ ĥ_safe − a_u Σ
    ĥ_unsafe

over the rows with v > 0; the loss is Σ a · relu(v); n is the length that counts as 1. Everything but a row's own state
is m and t: sums over rows. Rows that are all of a batch have them here; a part of it takes them from ``triplet_sums``
of every part. A zero state has cosine 0 and no gradient.

Memory above the inputs: forward, vectors [D]; backward, the gradient that it returns. The scratch is a few blocks of
rows.

Legend: R rows of both halves, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks, consumed
from .bend_tap import bend_tap_backward
from .context import Context, Gradients
from .oracles import triplet_sums_reference, triplet_tap_reference
from .rows import RowReader, blocks, count_rows
from .scratch import in_blocks, scratch_rule
from .selection import resolve


@dataclass(frozen=True)
class TripletSums:
    """Sums of one hidden state over a whole batch: Σ h over the unsafe rows, Σ ĥ over the active rows of each half, all
    [D].
    """

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
        self.acc, self.device = checks.accumulate_dtype(hidden.dtype), hidden.device

    def zeros(self) -> Tensor:
        """[D]."""
        return torch.zeros(self.width, dtype=self.acc, device=self.device)

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, rows)``."""
        for start, stop in blocks(self.count, self.width, self.device):
            yield start, stop, self.reader.read(start, stop).to(self.acc)


def _block(
    h: Tensor, r: Tensor, center: Tensor, margin: float, safe: bool, length: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(relu(v) [n], ∂v/∂h where v > 0 [n, D], Σ ĥ where v > 0 [D])``; ``center`` is m̂, ``length`` what
    counts as 1 of the safe distance, None where that is a cosine's.
    """
    unit, inverse = _units(h)
    along = (unit @ center)[:, None]
    toward_m = (center - along * unit) * inverse
    if safe and length is not None:
        difference = h - r
        norm = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
        value = norm / length - 1 + along + margin
        direction = difference * (_inverse(norm) / length) + toward_m
    else:
        unit_r, _ = _units(r)
        across = (unit * unit_r).sum(-1, keepdim=True)
        toward_r, sign = (unit_r - across * unit) * inverse, -1.0 if safe else 1.0
        value = (across - along) * sign + margin
        direction = (toward_r - toward_m) * sign
    active = value > 0
    return torch.relu(value).squeeze(1), direction * active, (unit * active).sum(0)


def _half(
    rows: _Rows, reference: Tensor, center: Tensor, margin: float, safe: bool, factor: float | None, unit: float | None
) -> tuple[Tensor, Tensor]:
    """``(Σ relu(v), Σ ĥ over v > 0)``; with a ``factor``, ``reference`` is overwritten with ``factor`` · ∂v/∂h."""
    total, units = rows.zeros().sum(), rows.zeros()
    for start, stop, h in rows.blocks():
        value, direction, active = _block(h, reference[start:stop].to(h.dtype), center, margin, safe, unit)
        total = total + value.sum()
        units += active
        if factor is not None:
            reference[start:stop] = direction * factor
    return total, units


def _halves(
    hidden: Tensor,
    reference: Tensor,
    rows: Tensor,
    safe_rows: int,
    center: Tensor,
    margins: Sequence[float],
    unit: float | None,
    factors: Sequence[float] | None,
) -> tuple[Tensor, Tensor]:
    values, units = [], []
    with checks.in_own_dtypes(hidden.device):
        for half, part in enumerate((slice(0, safe_rows), slice(safe_rows, None))):
            factor = None if factors is None else factors[half]
            value, active = _half(
                _Rows(hidden, rows[part]), reference[part], center, margins[half], half == 0, factor, unit
            )
            values.append(value)
            units.append(active)
    return torch.stack(values), torch.stack(units)


@torch.library.custom_op("repbend_kernels::unit_sums", mutates_args=())
def unit_sums(hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(Σ h, Σ ĥ)`` over ``rows``, [D] each in float32 (float64 for float64)."""
    walk = _Rows(hidden, rows)
    total, units = walk.zeros(), walk.zeros()
    for _, _, h in walk.blocks():
        total += h.sum(0)
        units += _units(h)[0].sum(0)
    return total, units


@unit_sums.register_fake
def _(hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    acc, width = checks.accumulate_dtype(hidden.dtype), hidden.shape[-1]
    return hidden.new_empty(width, dtype=acc), hidden.new_empty(width, dtype=acc)


@torch.library.custom_op("repbend_kernels::triplet_values", mutates_args=())
def triplet_values(
    hidden: Tensor,
    reference: Tensor,
    rows: Tensor,
    safe_rows: int,
    center: Tensor,
    margins: list[float],
    unit: float | None,
) -> tuple[Tensor, Tensor]:
    """``(Σ relu(v) [2], Σ ĥ over v > 0 [2, D])`` of both halves; ``center`` is m̂ [D], the first ``safe_rows`` of
    ``rows`` are safe.
    """
    return _halves(hidden, reference, rows, safe_rows, center, margins, unit, None)


@triplet_values.register_fake
def _(
    hidden: Tensor,
    reference: Tensor,
    rows: Tensor,
    safe_rows: int,
    center: Tensor,
    margins: list[float],
    unit: float | None,
) -> tuple[Tensor, Tensor]:
    acc = checks.accumulate_dtype(hidden.dtype)
    return hidden.new_empty(2, dtype=acc), hidden.new_empty((2, hidden.shape[-1]), dtype=acc)


@torch.library.custom_op("repbend_kernels::triplet_directions", mutates_args=("reference",))
def triplet_directions(
    hidden: Tensor,
    reference: Tensor,
    rows: Tensor,
    safe_rows: int,
    center: Tensor,
    margins: list[float],
    unit: float | None,
    factors: list[float],
) -> tuple[Tensor, Tensor]:
    """As ``triplet_values``, and ``reference`` [R, D] receives each half's factor · ∂v/∂h, but for the way
    through m.
    """
    return _halves(hidden, reference, rows, safe_rows, center, margins, unit, factors)


@triplet_directions.register_fake
def _(
    hidden: Tensor,
    reference: Tensor,
    rows: Tensor,
    safe_rows: int,
    center: Tensor,
    margins: list[float],
    unit: float | None,
    factors: list[float],
) -> tuple[Tensor, Tensor]:
    acc = checks.accumulate_dtype(hidden.dtype)
    return hidden.new_empty(2, dtype=acc), hidden.new_empty((2, hidden.shape[-1]), dtype=acc)


@torch.library.custom_op("repbend_kernels::add_to_rows_", mutates_args=("states",))
def add_to_rows_(states: Tensor, addend: Tensor) -> None:
    """``states`` [R, D] += ``addend`` [D], each row summed in the addend's dtype: the states may have 16 bits."""
    for start, stop in blocks(states.shape[0], states.shape[1], states.device):
        states[start:stop] = states[start:stop].to(addend.dtype) + addend


@add_to_rows_.register_fake
def _(states: Tensor, addend: Tensor) -> None:
    return None


class _AddDirection(torch.autograd.Function):
    """Identity on ``hidden`` with a loss whose gradient at the rows is ``direction``."""

    @staticmethod
    def forward(ctx: Context, hidden: Tensor, direction: Tensor, rows: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(direction, rows)
        ctx.shape = list(hidden.shape)
        ctx.set_materialize_grads(False)
        return hidden.view_as(hidden), loss.clone()

    @staticmethod
    def backward(ctx: Context, grad_hidden: Tensor | None, grad_loss: Tensor | None) -> Gradients:
        if grad_loss is None:
            return grad_hidden, None, None, None
        checks.check_first_derivative("triplet_tap")
        direction, rows = ctx.saved_tensors
        return bend_tap_backward(
            grad_hidden, direction, rows, rows.new_empty(0, dtype=torch.int32), grad_loss, ctx.shape, "torch"
        ), *[None] * 3


def triplet_tap(
    hidden: Tensor,
    reference: Tensor,
    rows: tuple[Tensor, Tensor],
    *,
    weights: tuple[float, float],
    margins: tuple[float, float],
    unit: float | None = 1.0,
    unsafe_rows: int | None = None,
    sums: TripletSums | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Triplets of selected rows of the residual stream, with their gradient put in at this place.

    Args:
        hidden: [..., D], any strides.
        reference: [R_safe + R_unsafe, D], what the rows are compared with, dtype and device of ``hidden``, no gradient.
            **Overwritten** with the direction of the gradient where one is wanted (``hidden`` requires grad and grad
            mode is on), else left alone.
        rows: int64 [R_safe] and [R_unsafe], unique indices into ``hidden.reshape(-1, D)``.
        weights: a_s and a_u.
        margins: p and q.
        unit: n, above 0; None makes the safe distance 1 − cos(h, r).
        unsafe_rows: N_u of the whole batch; None for these rows'.
        sums: over the whole batch; None where these rows are all of it.
        implementation: overrides the switch for this call; ``triton`` has no kernel of its own and is ``torch``.

    Returns:
        ``(hidden, loss, values)``: the same values as ``hidden``, to be used in its place; these rows' share of the
        loss, a float32 scalar (float64 for float64); and Σ relu(v) of each half, without weight or gradient.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device, or a reference that requires grad.
        IndexError: in debug mode, rows out of range.
        RuntimeError: ``triton`` asked for where it cannot run; a ``reference`` that holds the directions of an earlier
            call, or shares memory with ``hidden``; in backward, ``create_graph=True``.
    """
    _check(hidden, reference, rows, unit)
    if resolve(implementation, hidden) == "eager":
        unsafe, active = (None, None) if sums is None else (sums.unsafe, sums.units)
        return triplet_tap_reference(hidden, reference, rows, weights, margins, unit, unsafe_rows, unsafe, active)
    count = max(1, rows[1].shape[0] if unsafe_rows is None else unsafe_rows)
    both, states = torch.cat(rows), hidden.detach()
    center, inverse = _mean((unit_sums(states, rows[1])[0] if sums is None else sums.unsafe) / count)
    # The larger weight is a factor of the loss: what is kept in 16 bits need not hold it.
    largest = max(*weights, 1e-30)
    shares = [weight / largest for weight in weights]
    arguments = states, reference, both, rows[0].shape[0], center, list(margins), unit
    if not (hidden.requires_grad and torch.is_grad_enabled()):
        values, _ = triplet_values(*arguments)
        loss = _weighted(values, shares)
    else:
        consumed.check_apart("reference", [reference], [hidden], "hidden")
        consumed.drop_stale_notes([reference])
        values, units = triplet_directions(*arguments, shares)
        toward = units if sums is None else sums.units
        add_to_rows_(reference[rows[0].shape[0] :], _pull(toward, weights, largest, center, inverse) / count)
        consumed.note_directions([reference])
        hidden, loss = _AddDirection.apply(hidden, reference, both, _weighted(values, shares))
    return hidden, loss * largest, (values[0], values[1])


def _mean(mean: Tensor) -> tuple[Tensor, Tensor]:
    """``(m̂ [D], 1/‖m‖)``."""
    inverse = _inverse(torch.linalg.vector_norm(mean))
    return mean * inverse, inverse


def _pull(
    units: Tensor | tuple[Tensor, Tensor], weights: tuple[float, float], largest: float, center: Tensor, inverse: Tensor
) -> Tensor:
    """∂loss/∂m / largest [D], from Σ ĥ of both halves."""
    with checks.in_own_dtypes(center.device):
        toward = (units[0] * weights[0] - units[1] * weights[1]) / largest
        return (toward - center * (center @ toward)) * inverse


def _weighted(values: Tensor, shares: Sequence[float]) -> Tensor:
    """Σ share · value; a value without a share may be infinite."""
    loss = values.new_zeros(())
    for value, share in zip(values, shares):
        if share:
            loss = loss + value * share
    return loss


@torch.no_grad()
def triplet_sums(
    hidden: Tensor,
    rows: tuple[Tensor, Tensor],
    *,
    known: TripletSums | None = None,
    reference: Tensor | None = None,
    margins: tuple[float, float] = (0.0, 0.0),
    unit: float | None = 1.0,
    implementation: str | None = None,
) -> TripletSums:
    """The sums over a part of a batch, which ``plus`` adds up to those that :func:`triplet_tap` takes.

    Args:
        hidden, rows, margins, unit: as :func:`triplet_tap` takes them.
        known: sums over the whole batch with every row counted as active; then, with the ``reference`` of these rows,
            the unit sums are those of the rows with v > 0, and Σ h, which is in ``known`` already, is 0.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device; ``known`` without ``reference``.
    """
    if (known is None) != (reference is None):
        raise ValueError("known: expected together with reference")
    _check(hidden, reference, rows, unit)
    eager = resolve(implementation, hidden) == "eager"
    if known is None or reference is None:
        if eager:
            total, units = triplet_sums_reference(hidden, rows)
            return TripletSums(total, units)
        total, unsafe = unit_sums(hidden, rows[1])
        return TripletSums(total, (unit_sums(hidden, rows[0])[1], unsafe))
    center = known.unsafe * _inverse(torch.linalg.vector_norm(known.unsafe))
    if eager:
        _, units = triplet_sums_reference(hidden, rows, reference, center, margins, unit)
    else:
        _, (safe, unsafe) = triplet_values(
            hidden, reference, torch.cat(rows), rows[0].shape[0], center, list(margins), unit
        )
        units = safe, unsafe
    return TripletSums(torch.zeros_like(known.unsafe), units)


def _check(hidden: Tensor, reference: Tensor | None, rows: tuple[Tensor, Tensor], unit: float | None) -> None:
    checks.check_states("hidden", hidden)
    for name, part in zip(("rows[0]", "rows[1]"), rows, strict=True):
        checks.check_indices(name, part, count_rows(hidden), "hidden", hidden)
        checks.check_unique(name, part)
    if unit is not None:
        checks.check_positive("unit", unit)
    if reference is None:
        return
    checks.check_like("reference", reference, "hidden", hidden)
    checks.check_shape(
        "reference", reference, [rows[0].shape[0] + rows[1].shape[0], hidden.shape[-1]], "one row per index in rows"
    )
    checks.check_constant("reference", reference)
    consumed.check_references("reference", reference)


@scratch_rule("unit_sums")
def _(device: torch.device, hidden: Tensor, rows: Tensor) -> int:
    # Of a block: the rows as they are, in float32, and at length 1.
    return in_blocks(device, 3, rows.numel() * hidden.shape[-1])


@scratch_rule("triplet_values", "triplet_directions")
def _(device: torch.device, reference: Tensor) -> int:
    # Of a block: the rows as they are, both sides in float32 and at length 1, the two parts of the direction and what
    # they are made of.
    return in_blocks(device, 10, reference.numel())


@scratch_rule("add_to_rows_")
def _(device: torch.device, states: Tensor) -> int:
    return in_blocks(device, 2, states.numel())
