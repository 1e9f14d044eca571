"""The term ``refusal``: the safe answers of pairs are to be said, from the start and after the first tokens of an
unsafe answer.

    F = −Σ log p(safe answer | prompt, first k tokens of the unsafe answer) / answer tokens

k = 0 is the plain term. k > 0 is a recovery start (Qi et al., ICLR 2025, arXiv 2406.05946), whose safe answer can begin
with a separator. A draw is a function of seed, step and the token ids of the micro-batch's pairs, so that neither
resuming nor splitting a stream changes it.
"""

from __future__ import annotations

import hashlib
import math

from repbend_fast.data.records import Batch, PairSequence, Sequence
from repbend_fast.objectives.rows import count, predicting_rows, refused_pairs
from repbend_fast.objectives.sections import RefusalConfig
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import AnswerLoss


def refusal_streams(config: RefusalConfig, batch: Batch, step: int, seed: int | None) -> tuple[Stream, ...]:
    """The stream ``refusal``, where the term has a weight and the batch has pairs.

    Args:
        seed: the run's; None draws nothing and gives every pair the longest start that could be drawn, as a memory plan
            has to count.
    """
    pairs = refused_pairs(batch)
    if not config.refusal or not pairs:
        return ()
    starts = recovery_starts(config, pairs, step, seed)
    sequences = tuple(recovering(pair, start) for pair, start in zip(pairs, starts, strict=True))
    spans = predicting_rows(sequences)
    return (Stream("refusal", sequences, (AnswerLoss("refusal", spans, config.refusal, count(spans)),)),)


def recovering(pair: PairSequence, start: int) -> Sequence:
    """The prompt, the first ``start`` tokens of the unsafe answer, and what is to follow them: the pair's separator and
    the safe answer, of which a start can have some already.

    A start that ends as the safe answer begins ("…:", line breaks, "I"; "Of course, I") is gone on with: a second
    beginning behind it would be learned as one without end. Of the separator a start that ends with its first tokens
    gets the others. Without a start it is the safe answer alone. At least the safe answer's last token follows.
    """
    if start == 0:
        return pair.safe
    prompt = pair.unsafe.prompt_length
    head, answer = pair.unsafe.ids[: prompt + start], pair.safe.ids[prompt:]
    started = head[prompt:]
    way = max((answer, *pair.elsewhere), key=lambda way: _overlap(started, way[:-1]))
    said = _overlap(started, way[:-1])
    rest = way[said:] if said else (*pair.separator[_overlap(started, pair.separator) :], *answer)
    return Sequence((*head, *rest), len(head))


def _overlap(ids: tuple[int, ...], following: tuple[int, ...]) -> int:
    """The most first tokens of ``following`` that ``ids`` ends with."""
    longest = min(len(ids), len(following))
    return next(n for n in range(longest, -1, -1) if ids[len(ids) - n :] == following[:n])


def recovery_starts(config: RefusalConfig, pairs: tuple[PairSequence, ...], step: int, seed: int | None) -> list[int]:
    """k of each pair: 0, or 1 … ``recovery_tokens`` for ``recovery_share`` of them, never the whole unsafe answer.

    Of n pairs either of the two whole numbers next to share · n are chosen, share · n of them on average. Which ones is
    drawn anew in each step, and k from the pair alone. A pair whose unsafe answer has one token keeps 0.
    """
    most = [min(config.recovery_tokens, len(p.unsafe) - p.unsafe.prompt_length - 1) for p in pairs]
    if config.recovery_share == 0:
        return [0] * len(pairs)
    if seed is None:
        return [max(0, tokens) for tokens in most]
    keys = [_word(seed, step, p.unsafe.ids, p.safe.ids) for p in pairs]
    order = sorted(range(len(pairs)), key=keys.__getitem__)
    # Steps of `share` from a drawn offset: each that passes a whole number is one choice.
    offset = _word(seed, step, *sorted(keys)) * 2.0**-64
    starts = [0] * len(pairs)
    for place, number in enumerate(order):
        passed = math.floor(offset + (place + 1) * config.recovery_share) - math.floor(
            offset + place * config.recovery_share
        )
        if passed and most[number] > 0:
            starts[number] = 1 + _word(keys[number], "tokens") % most[number]
    return starts


def _word(*words: object) -> int:
    """64 bits from the words."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "big")
