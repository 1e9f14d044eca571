"""Batches of given lengths for planning: what may come at worst, and what the published distribution brings.

At worst all of a prompt are the assistant's earlier turns, for objectives that read those.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from repbend_fast.config import Config
from repbend_fast.data.encoded import EncodedRecords
from repbend_fast.data.records import Batch, BatchSizes, PairSequence, Role, Sequence
from repbend_fast.objectives.sections import RefusalConfig

# Lengths of the published data: prompts and answers log-normal, conversations uniform.
MEDIAN_TOKENS, SIGMA = 75, 0.6
CONVERSATION_TOKENS = (350, 1024)
SHORTEST_PROMPT = 16
MOST_RECORDS = 4000
# Ids of planned sequences. They differ, since a recovery start is shortened by what of separator and safe answer it has
# already (``objectives.refusal.recovering``).
SEPARATOR, SAFE, UNSAFE = 0, 1, 2


@dataclass(frozen=True)
class Limits:
    """The most tokens that can come in a prompt, in an answer, in a whole sequence of any role, and between a begun
    answer and a refusal.
    """

    prompt: int
    answer: int
    conversation: int
    separator: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of any role."""
        return self.conversation

    @property
    def between(self) -> tuple[int, ...]:
        """As many ids as a separator can have."""
        return (SEPARATOR,) * self.separator


def limits_of(config: Config) -> Limits:
    """By the recipe's token limits; a conversation is cut to prompt and answer together."""
    prompt, answer = config.data.max_prompt_tokens, config.data.max_answer_tokens
    objective = config.objective
    # No tokenizer makes more tokens of a text than it has bytes.
    separator = len(objective.recovery_separator.encode()) if isinstance(objective, RefusalConfig) else 0
    return Limits(prompt, answer, prompt + answer, separator)


def limits_of_sets(sets: Mapping[Role, Collection[Sequence | PairSequence]], config: Config) -> Limits:
    """By the encoded records themselves where they are few; tokenising hub-size sets for this would take minutes."""
    if sum(len(of_role) for of_role in sets.values()) > MOST_RECORDS:
        return limits_of(config)
    found: list[Sequence] = []
    for of_role in sets.values():
        for entry in _uncounted(of_role):
            found += [entry.unsafe, entry.safe] if isinstance(entry, PairSequence) else [entry]
    answered = [s for s in found if s.prompt_length]
    return Limits(
        prompt=max((s.prompt_length for s in answered), default=1),
        answer=max((len(s) - s.prompt_length for s in answered), default=1),
        conversation=max(map(len, found), default=2),
        separator=limits_of(config).separator,
    )


def _uncounted(of_role: Collection[Sequence | PairSequence]) -> Iterable[Sequence | PairSequence]:
    """The entries, without being counted as cut by the training that comes later."""
    if isinstance(of_role, EncodedRecords):
        return (of_role.encoder.encode(record, count=False) for record in of_role.records)
    return of_role


def even_batch(count: int, length: int, limits: Limits, pairs: bool, prompts: bool = False) -> Batch:
    """``count`` sequences of ``length`` tokens per role, with as many answer tokens (rows) as the limits allow.

    Args:
        pairs: give the bending streams their sequences as pairs, which share a prompt.
        prompts: as many prompt tokens as the limits allow instead, and one of an answer, for streams that read prompts
            alone.
    """
    prompt = (
        min(length - 1, limits.prompt) if prompts else max(min(SHORTEST_PROMPT, length - 1), length - limits.answer)
    )
    ids = (SAFE,) * (prompt + 1 if prompts else length)
    sequence = Sequence(ids, prompt, (0, prompt))
    chat = tuple(Sequence((SAFE,) * length, 0) for _ in range(count))
    if pairs:
        return Batch(pairs=(_pair(prompt, len(ids) - prompt, len(ids) - prompt, limits),) * count, retain=chat)
    return Batch((sequence,) * count, (sequence,) * count, (), chat)


def _pair(prompt: int, unsafe: int, safe: int, limits: Limits) -> PairSequence:
    """Answers of so many tokens."""
    asked = (SAFE,) * prompt
    return PairSequence(
        Sequence((*asked, *(UNSAFE,) * unsafe), prompt), Sequence((*asked, *(SAFE,) * safe), prompt), limits.between
    )


def worst_batch(sizes: BatchSizes, limits: Limits) -> Batch:
    """A micro-batch of the longest sequences of every role."""
    prompt = max(1, limits.longest - limits.answer)
    ids = (SAFE,) * limits.longest
    sequence, chat = Sequence(ids, prompt, (0, prompt)), Sequence(ids, 0)
    count, pair = sizes.examples, _pair(prompt, limits.longest - prompt, limits.longest - prompt, limits)
    kept, refused = (chat,) * sizes.of("retain"), (pair,) * sizes.further_refusals
    return Batch((sequence,) * count, (sequence,) * count, (pair,) * count, kept, refused)


def published_batch(sizes: BatchSizes, limits: Limits, pairs: bool, seed: int) -> Batch:
    """One micro-batch with lengths from the published distribution, cut to the limits."""
    generator = random.Random(f"lengths:{seed}")

    def tokens(most: int) -> int:
        return max(1, min(most, round(math.exp(generator.gauss(math.log(MEDIAN_TOKENS), SIGMA)))))

    def answer_to(prompt: int) -> Sequence:
        return Sequence((SAFE,) * (prompt + tokens(limits.answer)), prompt)

    def both() -> PairSequence:
        prompt = tokens(limits.prompt)
        return _pair(prompt, tokens(limits.answer), tokens(limits.answer), limits)

    def chat() -> Sequence:
        least, most = (min(limits.conversation, n) for n in CONVERSATION_TOKENS)
        return Sequence((SAFE,) * generator.randint(least, most), 0)

    each = range(sizes.examples)
    return Batch(
        tuple(answer_to(tokens(limits.prompt)) for _ in each),
        tuple(answer_to(tokens(limits.prompt)) for _ in each),
        tuple(both() for _ in each) if pairs else (),
        tuple(chat() for _ in range(sizes.of("retain"))),
        tuple(both() for _ in range(sizes.further_refusals)) if pairs else (),
    )
