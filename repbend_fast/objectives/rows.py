"""What methods share when they turn a batch into streams: which sequences, which rows, how many, and terms that several
have.
"""

from __future__ import annotations

from repbend_fast.data.records import Batch, PairSequence, Sequence
from repbend_fast.objectives.sections import WindowConfig
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import AnswerLoss, Distance, HeadKL, Span, Unit, rows_in

NOTHING: Span = (0, 0)
"""No row of a sequence."""
TURNS = "assistant_turns"
"""The loss mode that reads every turn of the assistant."""


def safe_sequences(batch: Batch) -> tuple[Sequence, ...]:
    """The safe conversations, and the safe halves of the pairs."""
    return (*batch.safe, *(pair.safe for pair in batch.pairs))


def forget_sequences(batch: Batch) -> tuple[Sequence, ...]:
    """What the methods with a forget set forget: the unsafe conversations, and the unsafe halves of the pairs."""
    return (*batch.unsafe, *(pair.unsafe for pair in batch.pairs))


def refused_pairs(batch: Batch) -> tuple[PairSequence, ...]:
    """The pairs whose safe answers are learned as refusals."""
    return (*batch.pairs, *batch.refused)


def all_rows(sequences: tuple[Sequence, ...]) -> tuple[Span, ...]:
    """Every position."""
    return tuple((0, len(s)) for s in sequences)


def answer_rows(sequences: tuple[Sequence, ...]) -> tuple[Span, ...]:
    """The positions of the answers."""
    return tuple((s.prompt_length, len(s)) for s in sequences)


def select_rows(sequence: Sequence, loss_mode: str) -> Span:
    """The positions of one sequence that ``loss_mode`` selects."""
    prompt, total = sequence.prompt_length, len(sequence)
    return {
        "prompt_last": (prompt - 1, prompt),
        "prompt_all": (0, prompt),
        "prompt_response": (0, total),
        "response_all": (prompt, total),
        TURNS: (*sequence.earlier, prompt, total),
    }[loss_mode]


def mode_rows(sequences: tuple[Sequence, ...], loss_mode: str) -> tuple[Span, ...]:
    """``select_rows`` of each sequence."""
    return tuple(select_rows(s, loss_mode) for s in sequences)


def predicting_rows(sequences: tuple[Sequence, ...], loss_mode: str = "response_all") -> tuple[Span, ...]:
    """The positions whose logits predict the tokens that ``loss_mode`` selects, the answers' by default; in a
    conversation without a prompt every token but the first.
    """
    return tuple(tuple(max(p - 1, 0) for p in span) for span in mode_rows(sequences, loss_mode))


def count(spans: tuple[Span, ...]) -> int:
    """Rows in all, at least 1, to divide by."""
    return max(1, rows_in(spans))


def padded_count(sequences: tuple[Sequence, ...], length: int | None) -> int:
    """Positions of a batch padded to ``length``, or to its longest sequence: what a mean over padding divides by."""
    return max(1, len(sequences) * max([length or 0, *(len(s) for s in sequences)]))


def layered_distance(
    name: str,
    spans: tuple[Span, ...],
    layers: tuple[int, ...],
    weight: float,
    unit: Unit,
    limit: float | None = None,
) -> Distance:
    """The mean l2 distance to the reference over ``spans`` and ``layers``. The embedding's is zero and has no gradient:
    it counts in the denominator and is not read.
    """
    denominator = max(1, rows_in(spans) * len(layers))
    moved = tuple(layer for layer in layers if layer > 0)
    return Distance(name, moved, spans, weight, denominator, limit=limit, unit=unit)


def pair_distance(
    name: str, batch: Batch, positions: int, layers: tuple[int, ...], weight: float, unit: Unit
) -> Distance:
    """Over the unsafe sequences, the mean l2 distance from the unsafe half of a pair to its safe half: ``positions``
    rows from the last of the prompt on, as far as both have them.
    """
    spans: list[Span] = [NOTHING] * len(batch.unsafe)
    against: list[Sequence | None] = [None] * len(batch.unsafe)
    for pair in batch.pairs:
        first = pair.unsafe.prompt_length - 1
        shared = min(len(pair.unsafe), len(pair.safe)) - first
        spans.append((first, first + min(positions, shared)))
        against.append(pair.safe)
    denominator = max(1, rows_in(tuple(spans)) * len(layers))
    return Distance(name, layers, tuple(spans), weight, denominator, against=tuple(against), unit=unit)


def mean_distance(
    name: str, sequences: tuple[Sequence, ...], layers: tuple[int, ...], unit: Unit = "state"
) -> Stream | None:
    """A stream of mean l2 distances over the answers' rows, for the guard; None where there are no sequences."""
    if not sequences:
        return None
    spans = answer_rows(sequences)
    return Stream(name, sequences, (Distance(name, layers, spans, 1.0, count(spans) * len(layers), unit=unit),))


def retain_kl(spans: tuple[Span, ...], weight: float, temperature: float, reduction: str = "token") -> HeadKL:
    """The KL term ``kl`` over ``spans``: per row, or summed over rows and per ``sequence``."""
    return HeadKL("kl", spans, weight, max(1, len(spans)) if reduction == "sequence" else count(spans), temperature)


def kl_stream(config: WindowConfig, sequences: tuple[Sequence, ...]) -> Stream:
    """The stream ``retain`` with the KL over all of its tokens, as the settings weigh and reduce it."""
    term = retain_kl(all_rows(sequences), config.kl_weight, config.temperature, config.kl_reduction)
    return Stream("retain", sequences, (term,))


def retain_nll(sequences: tuple[Sequence, ...], weight: float) -> AnswerLoss:
    """The negative log-likelihood per token of what is to stay, as the term ``nll``."""
    spans = predicting_rows(sequences)
    return AnswerLoss("nll", spans, weight, count(spans))
