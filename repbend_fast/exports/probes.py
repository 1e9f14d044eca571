"""The texts that an exported model is compared on: of the run's own data, where it is still to be had."""

from __future__ import annotations

from dataclasses import dataclass

from repbend_fast.config import Config
from repbend_fast.data.records import ROLES, PairSequence, Sequence
from repbend_fast.data.settings import SourceConfig
from repbend_fast.data.sources import load_records
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.errors import UserError

PER_ROLE = 3
ROWS = 8
"""Positions of each text, from the last of its prompt on."""
LONGEST = 256
_DRAWN, _DRAWN_LENGTH, _STRIDE = 8, 32, 7919


@dataclass(frozen=True)
class Probes:
    """Token ids with the position that the comparison begins at, and what they are, in words."""

    texts: tuple[tuple[tuple[int, ...], int], ...]
    what: str


def probes(config: Config, tokenizer: Tokenizer, vocabulary: int) -> Probes:
    """A few records of every role of the run's data, else of the demo's, else ids drawn from the vocabulary."""
    for what, sources in (("the run's data", config.data.sources), ("the demo's data", [SourceConfig(path="demo")])):
        try:
            found = _records(config, tokenizer, list(sources))
        except UserError:
            continue  # a source that is gone, or a tokenizer without a template that holds a conversation
        if found and all(token < vocabulary for ids, _ in found for token in ids):
            return Probes(tuple(found), f"{len(found)} records of {what}")
    drawn = [
        tuple((_STRIDE * (_DRAWN_LENGTH * text + place) + 3) % vocabulary for place in range(_DRAWN_LENGTH))
        for text in range(_DRAWN)
    ]
    return Probes(tuple((ids, _DRAWN_LENGTH - ROWS) for ids in drawn), f"{_DRAWN} rows of drawn token ids")


def _records(config: Config, tokenizer: Tokenizer, sources: list[SourceConfig]) -> list[tuple[tuple[int, ...], int]]:
    data = config.data
    encoder = ChatEncoder(tokenizer, data.max_prompt_tokens, data.max_answer_tokens, data.chat_template_kwargs)
    loaded = load_records(sources, seed=config.training.seed, skip_bad_records=True)
    found: list[tuple[tuple[int, ...], int]] = []
    for role in ROLES:
        for record in loaded.records[role][:PER_ROLE]:
            encoded = encoder.encode(record, count=False)
            found.append(_cut(encoded.unsafe if isinstance(encoded, PairSequence) else encoded))
    return found


def _cut(sequence: Sequence) -> tuple[tuple[int, ...], int]:
    start = max(sequence.prompt_length - 1, 0)
    ids = sequence.ids[: start + ROWS] if sequence.prompt_length else sequence.ids[:LONGEST]
    first = max(0, len(ids) - LONGEST)
    start = start if sequence.prompt_length else max(0, len(ids) - ROWS)
    return ids[first:], start - first
