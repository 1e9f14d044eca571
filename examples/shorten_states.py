"""An objective with a kind of term of its own: the unsafe answers' states are to be short. Nothing in the package knows
of it.

Train with it from this folder, where the module is found:

    repbend-fast train demo objective.name=shorten_states:ShortenStates

The declaration says what the term reads, without torch; the execution computes it in one piece of a stream. Pieces,
recomputation, packing, QLoRA, dropout, memory plans and the report come with them. docs/objectives.md describes both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from repbend_kernels import tap_rows
from torch import Tensor

from repbend_fast.data.records import Batch
from repbend_fast.errors import UserError
from repbend_fast.objectives import HeadKL, Probes, Span, Stream, Term
from repbend_fast.objectives.rows import all_rows, answer_rows, count, forget_sequences, mean_distance
from repbend_fast.step.meter import Meter, StreamResult
from repbend_fast.step.terms import Execution, Place, executes


@dataclass(frozen=True)
class Length(Term):
    """``weight × Σ_layers Σ_rows ‖h‖₂ / denominator``, the rows being ``spans`` of the stream's sequences."""

    name: str
    layers: tuple[int, ...]
    spans: tuple[Span, ...]
    weight: float
    denominator: float


@executes(Length)
class LengthExecution(Execution[Length]):
    """It compares with nothing, so no reference pass runs for it."""

    def __init__(self, term: Length, place: Place, sums: object = None) -> None:
        super().__init__(term, place, sums)
        self._values: list[Tensor] = []

    def tap(self, layer: int, hidden: Tensor) -> Tensor:
        """Take a copy of the rows; what is returned takes the state's place and carries the gradient on."""
        hidden, rows = tap_rows(hidden, self.rows)
        wide = torch.promote_types(rows.dtype, torch.float32)  # a sum of squares is too coarse in 16 bits
        value = torch.linalg.vector_norm(rows.to(wide), dim=-1).sum()
        self.place.meter.add_layer(self.term.name, layer, value)
        self._values.append(value)
        return hidden

    def losses(self) -> list[Tensor]:
        values, self._values = self._values, []
        return [value * (self.term.weight / self.term.denominator) for value in values]

    @classmethod
    def report(cls, term: Length, meter: Meter, result: StreamResult, sums: object) -> None:
        """The whole stream's value, and the mean length at each hidden state."""
        layers, rows = meter.layers[term.name], max(1, term.rows_of())
        result.terms[term.name] = torch.stack(list(layers.values())).sum() / term.denominator
        result.layers[term.name] = {layer: value / rows for layer, value in layers.items()}


class ShortenStates:
    """Streams ``shortened`` and ``retain``, which the KL keeps. Settings: ``layers``, and the weights ``length`` and
    ``kl``.
    """

    roles = ("unsafe", "pair", "retain")
    uses_head = True

    def __init__(self, settings: Mapping[str, object], num_blocks: int, steps: int | None = None) -> None:
        chosen = settings.get("layers", [num_blocks // 2])
        if not isinstance(chosen, list) or not all(isinstance(layer, int) for layer in chosen):
            raise UserError(f"objective.settings.layers={chosen!r}: must be a list of hidden states")
        self.layers: tuple[int, ...] = tuple(chosen)
        if not all(0 < layer <= num_blocks for layer in self.layers):
            raise UserError(f"objective.settings.layers={chosen}: this model has hidden states 1 … {num_blocks}")
        self.length, self.kl = float(str(settings.get("length", 1.0))), float(str(settings.get("kl", 1.0)))
        self.last_state = max(self.layers)

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        """Called for every micro-batch; ``step`` counts from 0."""
        unsafe, spans, kept = forget_sequences(batch), answer_rows(forget_sequences(batch)), all_rows(batch.retain)
        term = Length("length", self.layers, spans, self.length, count(spans) * len(self.layers))
        kl = HeadKL("kl", kept, self.kl, count(kept), temperature=1.0)
        return [Stream("shortened", unsafe, (term,)), Stream("retain", batch.retain, (kl,))]

    def probes(self, batch: Batch) -> Probes:
        """What the guard reports: distances of unsafe answers, and of ordinary conversations."""
        return Probes(
            bent=mean_distance("bent", forget_sequences(batch), self.layers),
            kept=mean_distance("kept", batch.retain, self.layers),
        )
