"""Pieces: some sequences of a stream as one batch for the decoder, padded on the right or packed into one row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repbend_fast.data.records import Sequence
from repbend_fast.objectives.terms import Span

Layout = Literal["padded", "packed"]


@dataclass(frozen=True)
class Piece:
    """``members[i]`` (index into the stream) starts at flat position ``offsets[i]`` of ``input_ids`` [B, T] (int64).

    ``position_ids`` [1, T] restarts at 0 for each member of a packed piece, and is None for a padded one.
    """

    members: tuple[int, ...]
    offsets: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor | None
    tokens: int

    @property
    def positions(self) -> int:
        """Positions that the decoder runs, padding included."""
        return self.input_ids.numel()

    def places(self) -> Tensor:
        """What each flat position is, whatever the layout: index in the stream · 2³² + position in the sequence, int64
        [B·T].
        """
        if self.position_ids is None:
            within = torch.arange(self.input_ids.shape[1]).expand(self.input_ids.shape)
            index = torch.tensor(self.members)[:, None]
        else:
            ends = torch.tensor([*self.offsets[1:], self.positions])
            starts = torch.tensor(self.offsets)
            index = torch.tensor(self.members).repeat_interleave(ends - starts)
            within = torch.arange(self.positions) - starts.repeat_interleave(ends - starts)
        return to_device((index * 2**32 + within).flatten(), self.input_ids.device)

    @property
    def rooms(self) -> tuple[int, ...]:
        """Positions of each member's place, padding included."""
        if self.position_ids is None:
            return (self.input_ids.shape[1],) * len(self.members)
        return tuple(stop - start for start, stop in zip(self.offsets, (*self.offsets[1:], self.positions)))

    def rows(self, spans: tuple[Span, ...]) -> Tensor:
        """Flat row indices (int64 [R], on the piece's device) of the stream's ``spans`` that lie in this piece."""
        parts = [torch.arange(o + spans[m][0], o + spans[m][1]) for m, o in zip(self.members, self.offsets)]
        return to_device(torch.cat(parts), self.input_ids.device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``, without waiting for the device: from pageable memory CUDA waits until its queue is
    empty.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def make_piece(
    sequences: tuple[Sequence, ...], members: tuple[int, ...], layout: Layout, device: torch.device
) -> Piece:
    """Lay out ``members`` of ``sequences``. Padding repeats id 0: rows on the right of a sequence never influence it.

    Sequences of one length are not packed: there is no padding to save, and a mask over all of them costs attention its
    square.
    """
    chosen = [sequences[m].ids for m in members]
    lengths = [len(ids) for ids in chosen]
    if layout == "packed" and len(set(lengths)) > 1:
        ids = torch.tensor([token for sequence in chosen for token in sequence], dtype=torch.int64)[None]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        offsets = tuple(sum(lengths[:i]) for i in range(len(lengths)))
        return Piece(members, offsets, to_device(ids, device), to_device(positions, device), sum(lengths))
    width = max(lengths)
    ids = torch.zeros(len(chosen), width, dtype=torch.int64)
    for i, sequence in enumerate(chosen):
        ids[i, : lengths[i]] = torch.tensor(sequence, dtype=torch.int64)
    return Piece(members, tuple(i * width for i in range(len(chosen))), to_device(ids, device), None, sum(lengths))


def split(
    sequences: tuple[Sequence, ...],
    piece_tokens: int | None,
    layout: Layout,
    members: Iterable[int] | None = None,
    prompts: tuple[int, ...] | None = None,
) -> list[tuple[int, ...]]:
    """Group the sequences, or those ``members`` of them, by length so that a piece holds at most ``piece_tokens``
    positions.

    Padding counts. A single sequence longer than that is a piece of its own. None puts everything into one piece. The
    longest come first, so that memory runs out early or not at all. Sequences of one number in ``prompts`` stay
    together.
    """
    order = sorted(range(len(sequences)) if members is None else members, key=lambda i: -len(sequences[i]))
    if piece_tokens is None:
        return [tuple(order)] if order else []
    together: dict[int, list[int]] = {}
    for i in order:
        together.setdefault(i if prompts is None else prompts[i], []).append(i)
    groups: list[tuple[int, ...]] = []
    current: list[int] = []
    for unit in together.values():
        lengths = [len(sequences[m]) for m in (*current, *unit)]
        filled = sum(lengths) if layout == "packed" else len(lengths) * max(lengths)
        if current and filled > piece_tokens:
            groups.append(tuple(current))
            current = []
        current += unit
    if current:
        groups.append(tuple(current))
    return groups
