"""Keys of LoRA dropout: what decides the mask of a row, whatever the step is cut into."""

from __future__ import annotations

import hashlib

from torch import Tensor

from repbend_fast.step.pieces import Piece

MASKS = 2
"""Version of what a key means, in a checkpoint's manifest: a run that goes on under another one draws other masks than
it would have. 1: each layer's masks are its own; 2: layers that read one tensor share theirs
(``models.layers.readers``).
"""


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """The dropout seed (63 bits) of one micro-batch, from the run's seed alone: a resumed run draws the same masks."""
    return _hash(seed, step, micro_batch)


def row_keys(piece: Piece, seed: int, stream: str) -> Tensor:
    """One key per flat position of a piece, int64 [B·T], from seed, stream, index in the stream and position: never the
    piece.
    """
    return piece.places() ^ _hash(seed, stream)


def _hash(*words: int | str) -> int:
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
