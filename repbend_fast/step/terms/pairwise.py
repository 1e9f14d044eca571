"""The pairwise cosine of a stream, exactly in pieces too: before the first piece is differentiated, the sums over the
other pieces' prompts are taken without a gradient; its own states complete them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from repbend_kernels import pairwise_cosine, tap_rows
from torch import Tensor

from repbend_fast.data.records import Sequence
from repbend_fast.models.decoder import run_decoder
from repbend_fast.objectives.terms import PairwiseCosine
from repbend_fast.step.meter import Meter, StreamResult
from repbend_fast.step.pieces import Piece
from repbend_fast.step.terms.execution import Execution, FirstPass, Place, executes


@dataclass
class PairwiseSums:
    """Sums over the unit states of ``count`` sequences of a stream: ``units`` Σ ĥ [layers, D], ``squares`` Σ ‖ĥ‖²
    [layers].
    """

    units: Tensor
    squares: Tensor
    count: int

    def value(self) -> Tensor:
        """The term over these sequences."""
        pair_mean = (self.units.square().sum(-1) - self.squares) / (self.count * (self.count - 1))
        return (1 - pair_mean).mean()

    def add(self, other: PairwiseSums) -> None:
        """Take other sequences in."""
        self.units, self.squares, self.count = (
            self.units + other.units,
            self.squares + other.squares,
            self.count + other.count,
        )


@executes(PairwiseCosine)
class PairwiseExecution(Execution[PairwiseCosine]):
    """Compares the last prompt tokens of a stream's sequences with each other, and with no reference."""

    sums_lack_piece = True

    def __init__(self, term: PairwiseCosine, place: Place, sums: PairwiseSums | None = None) -> None:
        super().__init__(term, place, sums)
        self._states: dict[int, Tensor] = {}

    @classmethod
    def first_pass(cls, term: PairwiseCosine, first: FirstPass, piece: Piece | None) -> PairwiseSums:
        # The piece's own states complete them: no prompt of it runs twice.
        own = piece.members if piece else ()
        others = [member for member in range(len(first.stream.sequences)) if member not in own]

        def work(prompts: Piece) -> PairwiseSums:
            with first.sums(prompts):
                return pairwise_sums(first, term, prompts)

        total, *rest = first.each(prompts_of(first.stream.sequences, term), work, others)
        for sums in rest:
            total.add(sums)
        if piece is None:
            units, squares = first.totals((total.units, total.squares))
            return PairwiseSums(units, squares, len(first.stream.sequences))
        return total

    def tap(self, layer: int, hidden: Tensor) -> Tensor:
        hidden, self._states[layer] = tap_rows(hidden, self.rows)
        return hidden

    def losses(self) -> list[Tensor]:
        term, sums = self.term, self.sums
        states = [self._states.pop(layer) for layer in term.layers]
        if sums is None:
            value = pairwise_cosine(states)
            self.place.meter.add(term.name, value.detach())
            return [value * term.weight]
        if sums.count < len(self.place.stream.sequences):
            sums.add(sums_of(states))
        return [pairwise_share(term, states, sums)]

    @classmethod
    def report(cls, term: PairwiseCosine, meter: Meter, result: StreamResult, sums: PairwiseSums | None) -> None:
        result.terms[term.name] = meter.values[term.name] if sums is None else sums.value()


def prompts_of(sequences: tuple[Sequence, ...], term: PairwiseCosine) -> tuple[Sequence, ...]:
    """The sequences up to the position that the term reads: by causality nothing behind it matters."""
    return tuple(Sequence(s.ids[: p + 1], min(s.prompt_length, p + 1)) for s, p in zip(sequences, term.positions))


def sums_of(states: list[Tensor]) -> PairwiseSums:
    """The sums of states [B, D] of each layer, without a gradient."""
    units = unit_states([s.detach() for s in states])
    return PairwiseSums(units.sum(1), units.square().sum((1, 2)), units.shape[1])


def pairwise_sums(first: FirstPass, term: PairwiseCosine, prompts: Piece) -> PairwiseSums:
    """The sums over one piece of prompts; LoRA dropout is the caller's, as in the piece's adapted pass."""
    parts, rows = first.parts, prompts.rows(term.spans)
    gathered: dict[int, Tensor] = {}

    def visit(layer: int, hidden: Tensor) -> Tensor:
        if layer in term.layers:
            gathered[layer] = hidden.reshape(-1, hidden.shape[-1])[rows]
        return hidden

    with parts.autocasting():
        run_decoder(
            parts.decoder,
            prompts.input_ids,
            packed=prompts.packed,
            stop=max(term.layers),
            visit=first.visit(prompts, visit),
        )
    return sums_of([gathered[layer] for layer in term.layers])


def unit_states(states: list[Tensor]) -> Tensor:
    """States [B, D] of each layer at length 1, [layers, B, D], in float32 or float64."""
    stacked = torch.stack(states)
    return torch.nn.functional.normalize(stacked if stacked.dtype == torch.float64 else stacked.float(), dim=-1)


def pairwise_share(term: PairwiseCosine, states: list[Tensor], sums: PairwiseSums) -> Tensor:
    """A scalar whose gradient is that of the weighted term in this piece's ``states`` (one [B, D] per layer).

    ∂C/∂ĥ_i = −2 s / (B (B − 1)) with s = Σ ĥ over the whole stream's B sequences, averaged over layers.
    """
    product = (unit_states(states) * sums.units[:, None, :]).sum()
    return product * (-2.0 * term.weight / (sums.count * (sums.count - 1) * len(states)))
