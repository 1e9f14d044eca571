"""The levers under which an attacker's training keeps a budget: an estimate from shapes, on the large side."""

from __future__ import annotations

from dataclasses import dataclass

from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.room import Widths
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import causal_model, find_decoder
from repbend_fast.step.levers import EVERY_STREAM, Levers

COPIES = 7
"""Of a trained parameter, in float32: itself, two gradients, two moments, and two while the optimizer steps."""


@dataclass(frozen=True)
class TrainingCost:
    """Bytes of a training on top of the model. ``row``: of a position in a block, with its graph; ``state``: of a
    hidden state; ``squares``: of a pair of positions in a block, for attention that keeps its scores and for masks;
    ``logits``: of a position at the head.
    """

    row: int
    state: int
    squares: int
    logits: int
    blocks: int

    @classmethod
    def of(cls, model: CausalLM, rank: int) -> TrainingCost:
        """From the model's configuration."""
        causal, widths = causal_model(model), Widths.of(model)
        size = max(4, causal.get_input_embeddings().weight.element_size())
        return cls(
            row=(10 * widths.hidden + 4 * widths.inner + 8 * rank) * size,
            state=widths.hidden * size,
            squares=(1 + 3 * widths.heads * widths.scores) * size,
            logits=3 * causal.config.get_text_config().vocab_size * size,
            blocks=find_decoder(model).num_blocks,
        )

    def piece(self, sequences: int, tokens: int, *, recompute: bool) -> int:
        """Bytes of a piece of so many sequences, padded to ``tokens`` each; ``recompute``: all blocks in backward."""
        block = sequences * (tokens * self.row + tokens * tokens * self.squares)
        states = (self.blocks + 2) * sequences * tokens * self.state
        return block + block // 4 + states if recompute else (self.blocks + 1) * block


def levers_within(budget: int | None, cost: TrainingCost, longest: int, batch: int, trained: int, piece: int) -> Levers:
    """The levers under which a training keeps ``budget`` bytes; None is no budget.

    Args:
        longest: tokens of the longest sequence.
        batch: sequences of a step.
        trained: number of the attacker's parameters.
        piece: most positions of a piece in any case.

    Raises:
        UserError: a single sequence does not fit, or the attacker's parameters alone do not.
    """
    if budget is None:
        return Levers({EVERY_STREAM: piece})
    left = budget - COPIES * 4 * trained
    rows = max(1, min(batch * longest, left // 4 // cost.logits))
    room = left - rows * cost.logits
    for recompute in (False, True):
        fitting = [n for n in range(1, batch + 1) if cost.piece(n, longest, recompute=recompute) <= room]
        if fitting:
            size = min(piece, max(fitting) * longest)
            return Levers({EVERY_STREAM: size}, checkpoint_blocks=cost.blocks * recompute, kl_chunk_rows=rows)
    least = budget - room + cost.piece(1, longest, recompute=True)
    raise UserError(
        f"relearning needs about {least / 2**20:.1f} MiB beside the model and the budget is {budget / 2**20:.1f} MiB; "
        "raise memory.budget, or lower ranks or data.max_answer_tokens"
    )


def scoring_levers(budget: int | None, cost: TrainingCost, piece: int) -> Levers:
    """The levers of passes without a gradient; the attacker's rank does not matter to them."""
    if budget is None:
        return Levers({EVERY_STREAM: piece})
    rows = max(1, budget // 4 // cost.logits)
    return Levers({EVERY_STREAM: max(1, min(piece, budget // 2 // (cost.row + 2 * cost.state)))}, kl_chunk_rows=rows)
