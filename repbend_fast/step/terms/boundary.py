"""How far rows point along the mean direction that the reference has in another sequence."""

from __future__ import annotations

import torch
from repbend_kernels import bend_tap
from repbend_kernels.blocks import accumulate_dtype
from torch import Tensor

from repbend_fast.models.decoder import run_decoder
from repbend_fast.models.layers.packing import to_device
from repbend_fast.objectives.terms import BoundaryCosine
from repbend_fast.step.meter import Meter, StreamResult
from repbend_fast.step.pieces import make_piece
from repbend_fast.step.terms.execution import Execution, Place, executes


@executes(BoundaryCosine)
class BoundaryExecution(Execution[BoundaryCosine]):
    """``kept`` holds m of each member of the piece, [members, D] in float32 or float64.

    ĥ·m = ‖m‖ cos(h, m), so that each member is one call of the cosine's tap.
    """

    def __init__(self, term: BoundaryCosine, place: Place, sums: object = None) -> None:
        super().__init__(term, place, sums)
        self._losses: list[Tensor] = []

    def compare(self) -> None:
        place, term = self.place, self.term
        others = tuple(term.against[member] for member in place.piece.members)
        piece = make_piece(others, tuple(range(len(others))), place.levers.layout, place.parts.device)
        rows = piece.rows(tuple((0, len(other)) for other in others))
        lengths = torch.tensor([len(other) for other in others])
        member = to_device(torch.arange(len(others)).repeat_interleave(lengths), place.parts.device)

        def visit(layer: int, hidden: Tensor) -> Tensor:
            if layer in term.layers:
                self.kept[layer] = mean_directions(hidden.reshape(-1, hidden.shape[-1])[rows], member, len(others))
            return hidden

        run_decoder(place.parts.decoder, piece.input_ids, packed=piece.packed, stop=max(term.layers), visit=visit)

    def tap(self, layer: int, hidden: Tensor) -> Tensor:
        term, piece = self.term, self.place.piece
        means = self.kept.pop(layer)
        lengths = torch.linalg.vector_norm(means, dim=-1)
        total = hidden.new_zeros((), dtype=means.dtype)
        start = 0
        for number, member in enumerate(piece.members):
            rows = self.rows[start : start + term.rows_of((member,))]
            start += len(rows)
            if len(rows):
                towards = means[number : number + 1].to(hidden.dtype)
                hidden, cosines = bend_tap(hidden, towards, rows, kind="relu_cosine")
                total = total + cosines * lengths[number]
        self._losses.append(total * (term.weight / term.denominator))
        self.place.meter.add_layer(term.name, layer, total)
        return hidden

    def losses(self) -> list[Tensor]:
        found, self._losses = self._losses, []
        return found

    @classmethod
    def report(cls, term: BoundaryCosine, meter: Meter, result: StreamResult, sums: object) -> None:
        layers, rows = meter.layers[term.name], term.rows or max(1, term.rows_of())
        result.terms[term.name] = torch.stack(list(layers.values())).sum() / term.denominator
        result.layers[term.name] = {layer: value / rows for layer, value in layers.items()}


def mean_directions(rows: Tensor, member: Tensor, count: int) -> Tensor:
    """The mean of the unit ``rows`` [R, D] of each of ``count`` members, [count, D]; ``member`` (int64 [R]) has whose
    each row is.
    """
    unit = torch.nn.functional.normalize(rows.to(accumulate_dtype(rows.dtype)), dim=-1)
    sums = unit.new_zeros(count, rows.shape[-1]).index_add_(0, member, unit)
    return sums / torch.bincount(member, minlength=count).clamp(min=1)[:, None]
