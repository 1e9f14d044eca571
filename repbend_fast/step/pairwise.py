"""The pairwise cosine of a stream in pieces, exactly: its sums come from a first pass over the prompts, without a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repbend_fast.data.records import Sequence
from repbend_fast.models.decoder import run_decoder
from repbend_fast.objectives.base import PairwiseCosine, Span, Stream
from repbend_fast.pieces import Piece
from repbend_fast.step.parts import ModelParts


def last_prompt_spans(term: PairwiseCosine) -> tuple[Span, ...]:
    """The one position of each sequence that the term reads."""
    return tuple((p, p + 1) for p in term.positions)


def prompts_of(stream: Stream) -> tuple[Sequence, ...]:
    """The stream's sequences up to the position that the pairwise term reads: by causality nothing behind it matters."""
    assert stream.pairwise is not None
    return tuple(Sequence(s.ids[: p + 1], min(s.prompt_length, p + 1)) for s, p in zip(stream.sequences, stream.pairwise.positions))


@dataclass
class PairwiseSums:
    """Sums over the unit states of a stream: ``units`` Σ ĥ [layers, D], ``squares`` Σ ‖ĥ‖² [layers]."""

    units: Tensor
    squares: Tensor

    def value(self, count: int) -> Tensor:
        """The term over ``count`` sequences."""
        pair_mean = (self.units.square().sum(-1) - self.squares) / (count * (count - 1))
        return (1 - pair_mean).mean()

    def plus(self, other: PairwiseSums | None) -> PairwiseSums:
        """Both together."""
        return self if other is None else PairwiseSums(self.units + other.units, self.squares + other.squares)


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
    units = unit_states([gathered[layer] for layer in term.layers])
    return PairwiseSums(units.sum(1), units.square().sum((1, 2)))


def unit_states(states: list[Tensor]) -> Tensor:
    """States [B, D] of each layer at length 1, [layers, B, D], in float32 or float64."""
    stacked = torch.stack(states)
    return torch.nn.functional.normalize(stacked if stacked.dtype == torch.float64 else stacked.float(), dim=-1)


def pairwise_share(term: PairwiseCosine, states: list[Tensor], count: int, sums: PairwiseSums) -> Tensor:
    """A scalar whose gradient is that of the weighted term in this piece's ``states`` (one [B, D] per layer).

    ∂C/∂ĥ_i = −2 s / (B (B − 1)) with s = Σ ĥ over the whole stream's ``count`` sequences, averaged over layers.
    """
    product = (unit_states(states) * sums.units[:, None, :]).sum()
    return product * (-2.0 * term.weight / (count * (count - 1) * len(states)))
