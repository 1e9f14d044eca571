"""Distances to the reference, to another answer's reference, or to a fixed row."""

from __future__ import annotations

import torch
from repbend_kernels import bend_tap
from torch import Tensor

from repbend_fast.data.records import Sequence
from repbend_fast.models.decoder import run_decoder
from repbend_fast.models.layers.packing import to_device
from repbend_fast.objectives.terms import Direction, Distance, Span, ranges_of
from repbend_fast.step.meter import Meter, StreamResult
from repbend_fast.step.pieces import make_piece
from repbend_fast.step.terms.execution import Execution, Place, executes


@executes(Distance)
class DistanceExecution(Execution[Distance]):
    """``kept`` is used up: ``bend_tap`` overwrites a buffer of reference rows with the gradient's direction."""

    def __init__(self, term: Distance, place: Place, sums: object = None) -> None:
        super().__init__(term, place, sums)
        self._losses: list[Tensor] = []

    def compare(self) -> None:
        if self.term.against is not None and any(self.term.against):
            self._replace_against(self.term.against)

    def _replace_against(self, against: tuple[Sequence | None, ...]) -> None:
        """Take reference rows after the shared prompt from the other answer.

        Rows of the prompt itself are equal by causality and stay those of this piece's own pass: the same shapes give
        the same bits, so their distance at B = 0 is exactly zero.
        """
        place, term = self.place, self.term
        others: list[Sequence] = []
        theirs: list[Span] = []
        target: list[Tensor] = []
        position = 0
        for member in place.piece.members:
            other = against[member]
            for start, stop in ranges_of(term.spans[member]):
                first = max(start, place.stream.sequences[member].prompt_length)
                if other is not None and first < stop:
                    others.append(other)
                    theirs.append((first, stop))
                    target.append(torch.arange(position + first - start, position + stop - start))
                position += stop - start
        parts = place.parts
        if not others and parts.lockstep:
            # Another process's rows have a counterpart, and its pass needs this one's.
            others, theirs, target = [next(filter(None, against))], [(0, 0)], [torch.arange(0)]
        if not others:
            return
        other_piece = make_piece(tuple(others), tuple(range(len(others))), place.levers.layout, parts.device)
        source, into = other_piece.rows(tuple(theirs)), to_device(torch.cat(target), parts.device)

        def visit(layer: int, hidden: Tensor) -> Tensor:
            if layer in term.layers:
                self.kept[layer][into] = hidden.reshape(-1, hidden.shape[-1])[source]
            return hidden

        run_decoder(
            parts.decoder,
            other_piece.input_ids,
            packed=other_piece.packed,
            stop=max(term.layers),
            visit=visit,
        )

    def tap(self, layer: int, hidden: Tensor) -> Tensor:
        term, power = self.term, self.term.unit_power
        unit = self.place.parts.unit(layer, power)
        length = self.place.parts.unit(layer, min(power, 1))
        compared = fixed_row(term.target, hidden, length) if term.target else self.kept.pop(layer)
        hidden, distance = bend_tap(hidden, compared, self.rows, kind=term.kind, limit=term.limit)
        self._losses.append(distance * (term.weight / term.denominator / unit))
        self.place.meter.add_layer(term.name, layer, distance.detach() / unit if power else distance)
        return hidden

    def losses(self) -> list[Tensor]:
        found, self._losses = self._losses, []
        return found

    @classmethod
    def report(cls, term: Distance, meter: Meter, result: StreamResult, sums: object) -> None:
        layers = meter.layers[term.name]
        rows = term.rows or max(1, term.rows_of())
        result.terms[term.name] = torch.stack(list(layers.values())).sum() / term.denominator
        result.layers[term.name] = {layer: value / rows for layer, value in layers.items()}


def fixed_row(direction: Direction, hidden: Tensor, unit: float = 1.0) -> Tensor:
    """The row c·u that a term with a fixed target compares with, [1, D], the same on every device; c is a multiple of
    ``unit``.
    """
    row = torch.rand(
        hidden.shape[-1], generator=torch.Generator().manual_seed(direction.seed), dtype=torch.float32
    ).double()
    return to_device(
        (row * (direction.length * unit / torch.linalg.vector_norm(row)))[None].to(hidden.dtype), hidden.device
    )
