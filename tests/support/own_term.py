"""A kind of term that the package does not have: its declaration, its execution, and an objective of it. Nothing else
knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from repbend_kernels import tap_rows
from torch import Tensor

from repbend_fast.data.records import Batch
from repbend_fast.objectives import Probes, Span, Stream, Term
from repbend_fast.objectives.rows import answer_rows, count, forget_sequences, mean_distance
from repbend_fast.step.terms import Execution, executes


@dataclass(frozen=True)
class SquaredNorm(Term):
    """``weight × Σ_layers Σ_rows mean(h²) / denominator``."""

    name: str
    layers: tuple[int, ...]
    spans: tuple[Span, ...]
    weight: float
    denominator: float


@executes(SquaredNorm)
class SquaredNormExecution(Execution[SquaredNorm]):
    found: list[Tensor]

    def tap(self, layer: int, hidden: Tensor) -> Tensor:
        hidden, rows = tap_rows(hidden, self.rows)
        wide = rows if rows.dtype == torch.float64 else rows.float()
        value = wide.square().mean(-1).sum() / self.term.denominator
        self.found = [*getattr(self, "found", ()), value]
        return hidden

    def losses(self) -> list[Tensor]:
        values, self.found = self.found, []
        for value in values:
            self.place.meter.add(self.term.name, value.detach())
        return [value * self.term.weight for value in values]


class Small:
    """Makes the unsafe answers' states short at hidden states 1 and 2."""

    roles = ("unsafe", "pair")
    uses_head = False
    last_state = 2

    def __init__(self, settings: Mapping[str, Any], num_blocks: int, steps: int | None = None) -> None:
        self.layers = (1, 2)

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        sequences = forget_sequences(batch)
        spans = answer_rows(sequences)
        term = SquaredNorm("short", self.layers, spans, 2.0, count(spans) * len(self.layers))
        return [Stream("shrunk", sequences, (term,))]

    def probes(self, batch: Batch) -> Probes:
        return Probes(bent=mean_distance("moved", forget_sequences(batch), self.layers))
