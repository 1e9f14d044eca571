"""Tells transformers whether a row holds several sequences, which it would otherwise read off the position ids.

Reading them makes the host wait for the device at the start of every pass, with nothing left for the device to do
meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import masking_utils


@contextmanager
def known_packing(packed: bool) -> Iterator[None]:
    """While entered, masks are made for rows of several sequences (``packed``), or of one; in both cases without
    looking at values.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _sequence_numbers if packed else _one_sequence
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _one_sequence(position_ids: Tensor) -> None:
    del position_ids


def _sequence_numbers(position_ids: Tensor) -> Tensor:
    """Which sequence of its row each position belongs to, int64 [B, T]; a new one begins where positions do not go on
    by 1.
    """
    follows = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) == 1
    return (~follows).cumsum(-1)
