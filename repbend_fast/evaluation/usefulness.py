"""What bending cost: ordinary language against the base, answers that end by themselves, harmless requests refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Sequence
from repbend_fast.errors import UserError
from repbend_fast.evaluation.generate import Answer
from repbend_fast.evaluation.judges.protocol import Opinion
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import causal_model, find_decoder
from repbend_fast.models.layers.switches import evaluation_mode, reference_model
from repbend_fast.step.retreat import OutOfMemory, attempt

CHUNK_ROWS = 256
"""Rows whose distributions are held in float32 at once."""


@dataclass(frozen=True)
class LanguageStatistics:
    """Of the measured model against the reference, in nats; the last four are None where there is no reference.

    ``perplexity`` and ``reference_perplexity`` are of the tokens that the rows predict, ``kl`` = KL(reference ‖ model)
    per row. ``first_kl``: the same over the first tokens of answers alone, None where no sequence has a prompt. A model
    that begins as the reference does and then falls apart has a small one and a large ``kl``.
    """

    perplexity: float
    tokens: int
    reference_perplexity: float | None = None
    perplexity_ratio: float | None = None
    kl: float | None = None
    first_kl: float | None = None


@dataclass(frozen=True)
class AnswerStatistics:
    """``mean_answer_tokens`` without the end token; ``stopped``: share that ended by itself. None without answers."""

    mean_answer_tokens: float | None
    stopped: float | None
    count: int


@dataclass(frozen=True)
class OverRefusal:
    """Borderline prompts that were refused, and those without a verdict, of ``count``; a share of all of them."""

    refused: int
    unparsed: int
    count: int

    @property
    def rate(self) -> float | None:
        """Refused of all; None without borderline prompts. An unparsed one may have been refused too."""
        return self.refused / self.count if self.count else None


def answer_statistics(answers: Seq[Answer]) -> AnswerStatistics:
    """Length and stopping of generated answers."""
    if not answers:
        return AnswerStatistics(None, None, 0)
    count = len(answers)
    return AnswerStatistics(sum(a.tokens for a in answers) / count, sum(a.stopped for a in answers) / count, count)


def over_refusal(prompts: Seq[Prompt], opinions: Seq[Opinion]) -> OverRefusal:
    """Harmless requests that one judge finds refused; prompts of other kinds do not count."""
    labels = [o.label for p, o in zip(prompts, opinions, strict=True) if p.kind == "borderline"]
    return OverRefusal(labels.count("refuse"), labels.count("unparsed"), len(labels))


def usefulness(
    language: LanguageStatistics | None, answers: AnswerStatistics, refusals: OverRefusal | None = None
) -> dict[str, object]:
    """All of it by name, as ``eval.json`` has it for one side; what was not measured is None."""
    named = asdict(language) if language else dict.fromkeys(LanguageStatistics.__dataclass_fields__)
    named["mean_answer_tokens"], named["stopped"] = answers.mean_answer_tokens, answers.stopped
    return named | {
        "over_refusal": refusals.rate if refusals else None,
        "over_refusal_unparsed": refusals.unparsed if refusals else None,
        "over_refusal_count": refusals.count if refusals else None,
    }


Without = Callable[[CausalLM], AbstractContextManager[object]]
"""While entered, the model is the one that others are compared with."""


@torch.no_grad()
def language_statistics(
    model: CausalLM, sequences: Seq[Sequence], *, reference: CausalLM | None = None, piece_tokens: int = 2048
) -> LanguageStatistics:
    """Perplexity of ``model`` on held-out text, and its distance from ``reference``.

    Args:
        model: a causal LM of transformers, or a peft model around one.
        sequences: where a prompt's length is 0 all rows count, template included; else those from the last of the
            prompt on, which predict the answer.
        reference: the unquantised base; None = ``model`` without its adapter where it has one, else nothing.
        piece_tokens: positions that run at once, padding included; halved where memory runs out.

    Raises:
        UserError: the vocabularies differ, or there is no memory for a single sequence.
    """
    without: Without = nullcontext
    if reference is None and hasattr(model, "get_base_model"):
        reference, without = model, reference_model
    sums = _Sums()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    with evaluation_mode(model), evaluation_mode(reference if reference is not None else model):
        done = 0
        while done < len(order):
            chosen = _fitting([sequences[i] for i in order[done:]], piece_tokens)
            work = partial(_measure, model, reference, without, chosen)
            found = attempt(work, find_decoder(causal_model(model)).device)
            if isinstance(found, OutOfMemory):
                if len(chosen) == 1:
                    raise UserError(
                        f"out of memory while a conversation of {len(chosen[0])} tokens was measured "
                        f"({found.reason}); use shorter ones or set model.quantization=nf4"
                    )
                piece_tokens = len(chosen) * len(chosen[-1]) // 2
                continue
            sums.add(found)
            done += len(chosen)
    return sums.result(reference is not None)


class _Sums:
    """Float64 sums over rows."""

    def __init__(self) -> None:
        self.log_probability = self.reference = self.divergence = self.first = 0.0
        self.predicted = self.rows = self.firsts = 0

    def add(self, other: _Sums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def result(self, compared: bool) -> LanguageStatistics:
        own = _perplexity(self.log_probability, self.predicted)
        if not compared:
            return LanguageStatistics(own, self.rows)
        base = _perplexity(self.reference, self.predicted)
        return LanguageStatistics(
            own,
            self.rows,
            base,
            own / base if math.isfinite(base) else None,
            self.divergence / max(1, self.rows),
            self.first / self.firsts if self.firsts else None,
        )


def _perplexity(log_probability: float, count: int) -> float:
    # exp overflows beyond 709 nats per token: a model that is that ruined has an infinite perplexity.
    nats = -log_probability / max(1, count)
    return math.exp(nats) if not nats > 700 else math.inf


def _fitting(sequences: Seq[Sequence], piece_tokens: int) -> list[Sequence]:
    """The first of ``sequences``, which come by length, that fit into a piece padded to the longest; at least one."""
    count = 1
    while count < len(sequences) and (count + 1) * len(sequences[count]) <= piece_tokens:
        count += 1
    return list(sequences[:count])


def _measure(model: CausalLM, reference: CausalLM | None, without: Without, sequences: Seq[Sequence]) -> _Sums:
    width = max(len(s) for s in sequences)
    # Padding on the right of a causal model changes no real row.
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence.ids)
        mask[row, : len(sequence)] = 1
    logits = _logits(model, ids, mask)
    others = None
    if reference is not None:
        with without(reference):
            others = _logits(reference, ids, mask)
    if others is not None and others.shape[-1] != logits.shape[-1]:
        raise UserError(
            f"the models have different vocabularies ({logits.shape[-1]} and {others.shape[-1]} tokens), so their "
            "distributions cannot be compared; measure them with one tokenizer and no added tokens"
        )
    sums = _Sums()
    for row, sequence in enumerate(sequences):
        start = max(0, sequence.prompt_length - 1)
        # Behind an answer nothing is predicted that could be compared with it; of whole conversations all rows count.
        stop = len(sequence) - (sequence.prompt_length > 0)
        for begin in range(start, stop, CHUNK_ROWS):
            rows = slice(begin, min(stop, begin + CHUNK_ROWS))
            targets = torch.tensor(sequence.ids[begin + 1 : rows.stop + 1], device=logits.device)
            divergence = _add_rows(sums, logits[row, rows], None if others is None else others[row, rows], targets)
            if divergence is not None and begin == start and sequence.prompt_length:
                sums.first += float(divergence[0])
                sums.firsts += 1
    return sums


def _logits(model: CausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, T, V] in the model's own dtype."""
    causal = causal_model(model)
    device = find_decoder(causal).device
    return causal(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits


def _add_rows(sums: _Sums, logits: Tensor, others: Tensor | None, targets: Tensor) -> Tensor | None:
    """Add rows [R, V] and the tokens that they predict, [R] or one fewer; returns KL(others ‖ logits) per row."""
    index = targets[:, None]
    own = logits.float().log_softmax(-1)
    sums.log_probability += float(own[: len(targets)].gather(1, index).double().sum())
    sums.predicted += len(targets)
    sums.rows += len(logits)
    if others is None:
        return None
    theirs = others.to(logits.device).float().log_softmax(-1)
    sums.reference += float(theirs[: len(targets)].gather(1, index).double().sum())
    divergence = (theirs.exp() * (theirs - own)).sum(-1).double()
    sums.divergence += float(divergence.sum())
    return divergence
