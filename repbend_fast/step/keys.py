"""Seeds of LoRA dropout: what decides a mask, whatever the step is cut into."""

from __future__ import annotations

import hashlib


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """The dropout seed (63 bits) of one micro-batch, from the run's seed alone: a resumed run draws the same masks."""
    return hash_words(seed, step, micro_batch)


def hash_words(*words: int | str) -> int:
    """63 well-mixed bits of the words, the same in every process."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
