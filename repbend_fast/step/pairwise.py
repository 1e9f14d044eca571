"""The pairwise cosine of a stream in pieces, exactly: before the first piece is differentiated, the sums over the other pieces' prompts
are taken without a gradient; its own states complete them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repbend_fast.data.records import Sequence
from repbend_fast.models.decoder import run_decoder
from repbend_fast.objectives.base import PairwiseCosine, Span, Stream
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.pieces import Piece


def last_prompt_spans(term: PairwiseCosine) -> tuple[Span, ...]:
    """The one position of each sequence that the term reads."""
    return tuple((p, p + 1) for p in term.positions)


def prompts_of(stream: Stream) -> tuple[Sequence, ...]:
    """The stream's sequences up to the position that the pairwise term reads: by causality nothing behind it matters."""
    assert stream.pairwise is not None
    return tuple(Sequence(s.ids[: p + 1], min(s.prompt_length, p + 1)) for s, p in zip(stream.sequences, stream.pairwise.positions))


@dataclass
class PairwiseSums:
    """Sums over the unit states of ``count`` sequences of a stream: ``units`` Σ ĥ [layers, D], ``squares`` Σ ‖ĥ‖² [layers]."""

    units: Tensor
    squares: Tensor
    count: int

    def value(self) -> Tensor:
        """The term over these sequences."""
        pair_mean = (self.units.square().sum(-1) - self.squares) / (self.count * (self.count - 1))
        return (1 - pair_mean).mean()

    def add(self, other: PairwiseSums) -> None:
        """Take other sequences in."""
        self.units, self.squares, self.count = self.units + other.units, self.squares + other.squares, self.count + other.count


def sums_of(states: list[Tensor]) -> PairwiseSums:
    """The sums of states [B, D] of each layer, without a gradient."""
    units = unit_states([s.detach() for s in states])
    return PairwiseSums(units.sum(1), units.square().sum((1, 2)), units.shape[1])


@torch.no_grad()
def pairwise_sums(parts: ModelParts, term: PairwiseCosine, prompts: Piece) -> PairwiseSums:
    """The sums over one piece of prompts; LoRA dropout is the caller's, as in the piece's adapted pass."""
    rows = prompts.rows(last_prompt_spans(term))
    gathered: dict[int, Tensor] = {}

    def visit(layer: int, hidden: Tensor) -> Tensor:
        if layer in term.layers:
            gathered[layer] = hidden.reshape(-1, hidden.shape[-1])[rows]
        return hidden

    with parts.autocasting():
        run_decoder(parts.decoder, prompts.input_ids, position_ids=prompts.position_ids, stop=max(term.layers), visit=visit)
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
