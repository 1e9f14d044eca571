"""An attacker's fine-tuning: LoRA on top of a model that stays as it is, on the answers of some records."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from repbend_kernels import linear_log_prob
from torch import Tensor, nn

from repbend_fast.assessment.attacker_memory import TrainingCost, levers_within, scoring_levers
from repbend_fast.console import note
from repbend_fast.data.records import Sequence
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import find_decoder, find_head, run_decoder
from repbend_fast.models.layers.offload import host_states
from repbend_fast.models.layers.stacked import StackedLora
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.pieces import Piece, make_piece, split
from repbend_fast.step.proof import prove_model
from repbend_fast.step.retreat import Load, OutOfMemory, attempt, fresh_gradients, retreat

T = TypeVar("T")
Sequences = tuple[Sequence, ...]

PLAIN = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}"
    "{% endif %}{% endfor %}"
)
"""A conversation without a chat template: the request, a line's end, the answer, the model's end of text."""
PIECE_TOKENS = 4096
LARGEST_GRADIENT = 1.0
STREAM = "attacker's answers"


def plain_encoder(encoder: ChatEncoder) -> ChatEncoder:
    """``encoder`` without its chat template (``PLAIN``)."""
    tokenizer = copy.copy(encoder.tokenizer)
    tokenizer.chat_template = PLAIN
    plain = ChatEncoder(tokenizer, encoder.max_prompt_tokens, encoder.max_answer_tokens)
    plain.vocabulary = encoder.vocabulary
    return plain


class AnswerScores:
    """Log-probabilities of answers under a model as it is at the time, in pieces that fit into memory.

    Args:
        budget: bytes that passes and a training may use beside the model; None for no limit.

    Attributes:
        levers: those in force; running out of memory moves them, and they stay there.
        parts: the model's.

    Raises:
        UserError: the model's head is no plain matrix, or its passes are not what they have to be (``step.proof``).
    """

    def __init__(self, model: CausalLM, budget: int | None = None) -> None:
        decoder = find_decoder(model)
        self.budget = budget
        self.parts = ModelParts(model, decoder, find_head(model), decoder.device, None)
        self.levers = scoring_levers(budget, TrainingCost.of(model, 0), PIECE_TOKENS)
        with torch.no_grad():
            prove_model(self.parts, "off", "off")

    @torch.no_grad()
    def perplexity(self, sequences: Sequences) -> float:
        """Of the answers' tokens; of all tokens after the first where a sequence has no prompt. Infinite for a ruined
        model.
        """
        total = sum(float(value) for value in self.each_piece(sequences, partial(self.log_probability, sequences)))
        nats = -total / max(1, answer_tokens(sequences))
        return math.exp(nats) if nats <= 700 else math.inf

    def log_probability(self, sequences: Sequences, piece: Piece) -> Tensor:
        """Sum over the answers' tokens of a piece, differentiable in what is stacked on the model."""
        final: list[Tensor] = []
        last, rows = self.parts.decoder.num_blocks, piece.rows(tuple(map(_answer, sequences)))

        def visit(layer: int, hidden: Tensor) -> Tensor:
            if layer == last:
                final.append(hidden.reshape(-1, hidden.shape[-1])[rows])
            return hidden

        run_decoder(
            self.parts.decoder,
            piece.input_ids,
            stop=last,
            visit=visit,
            checkpoint_blocks=self.levers.checkpoint_blocks,
            offload=host_states(self.levers.offload_checkpoints, self.parts.device),
        )
        assert self.parts.head is not None
        head = self.parts.head.on(self.parts.device)
        targets = piece.input_ids.reshape(-1)[rows + 1]
        chunk = self.levers.kl_chunk_rows
        return linear_log_prob(
            head.inputs(final[0]),
            head.weight,
            targets,
            bias=head.bias,
            softcap=head.softcap,
            ignore_index=None,
            chunk_rows=chunk,
        ).sum()

    def each_piece(self, sequences: Sequences, work: Callable[[Piece], T]) -> Iterator[T]:
        """``work`` on each piece in turn. Where memory runs out a lever gives way, and what is left is cut anew.

        Raises:
            UserError: memory ran out with every lever at its end.
        """
        waiting = split(sequences, self.levers.piece_size(STREAM), "padded")
        while waiting:
            piece = make_piece(sequences, waiting[0], "padded", self.parts.device)
            result = attempt(partial(work, piece), self.parts.device)
            if isinstance(result, OutOfMemory):
                self._retreat(sequences, piece)
                left = [member for members in waiting for member in members]
                waiting = split(sequences, self.levers.piece_size(STREAM), "padded", left)
            else:
                waiting.pop(0)
                yield result

    def _retreat(self, sequences: Sequences, piece: Piece) -> None:
        assert self.parts.head is not None
        rows = answer_tokens(tuple(sequences[m] for m in piece.members))
        load = Load(STREAM, len(piece.members), piece.positions, rows, self.parts.head.weight.shape[0])
        self.levers, change = retreat(self.levers, load, self.parts.decoder.num_blocks, self.parts.device)
        note(f"out of memory ({load}): {change} from here on")


class FineTuning:
    """One training of the attacker's: AdamW at a constant rate, so that what it has after n steps is what n steps give.

    Args:
        scores: of the model that is attacked.
        sequences: what is trained on, by the answers alone; every epoch in another order.
        batch: sequences of a step.
        seed: decides A and the orders, and nothing else is random.

    Raises:
        UserError: the budget holds no single sequence.
    """

    def __init__(
        self, scores: AnswerScores, sequences: Sequences, *, rank: int, learning_rate: float, batch: int, seed: int
    ) -> None:
        self.scores = scores
        self.sequences = sequences
        self.batch = batch
        self.seed = seed
        self.done = 0
        self.lora = StackedLora(scores.parts.decoder.layers, rank, 2.0 * rank, seed)
        if scores.budget is not None:
            scores.levers = levers_within(
                scores.budget,
                TrainingCost.of(scores.parts.model, rank),
                max(map(len, sequences)),
                batch,
                sum(p.numel() for p in self.lora.parameters),
                PIECE_TOKENS,
            )
        self._optimizer = torch.optim.AdamW(self.lora.parameters, lr=learning_rate, weight_decay=0.0)

    def advance(self, until: int) -> float:
        """Go on to step ``until``; the mean loss per answer token of the last step, NaN where it was not finite."""
        loss = math.nan
        with self.lora.on():
            while self.done < until:
                loss = self._step(self._chosen())
                self.done += 1
                if not math.isfinite(loss):
                    return math.nan
        return loss

    def _step(self, chosen: Sequences) -> float:
        parameters = self.lora.parameters
        self._optimizer.zero_grad(set_to_none=True)
        share = 1 / max(1, answer_tokens(chosen))

        def backward(piece: Piece) -> float:
            with fresh_gradients(parameters):
                loss = -share * self.scores.log_probability(chosen, piece)
                loss.backward()
            return float(loss.detach())

        with torch.enable_grad():
            loss = sum(self.scores.each_piece(chosen, backward))
        if math.isfinite(loss):
            nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
            self._optimizer.step()
        return loss

    def _chosen(self) -> Sequences:
        count = len(self.sequences)
        size = min(self.batch, count)
        chosen = []
        for number in range(self.done * size, (self.done + 1) * size):
            epoch, place = divmod(number, count)
            chosen.append(self.sequences[_order(count, self.seed, epoch)[place]])
        return tuple(chosen)


def _order(count: int, seed: int, epoch: int) -> list[int]:
    random = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=random).tolist()


def answer_tokens(sequences: Sequences) -> int:
    """Tokens whose probability counts."""
    return sum(end - start for start, end in map(_answer, sequences))


def _answer(sequence: Sequence) -> tuple[int, int]:
    """The rows that predict the answer's tokens."""
    return max(0, sequence.prompt_length - 1), max(len(sequence) - 1, 0)
