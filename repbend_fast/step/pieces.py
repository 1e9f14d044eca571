"""Pieces: some sequences of a stream as one batch for the decoder, padded on the right or packed into one row.

Pieces of several streams can share a batch. Each then says which of the batch's positions are its own, so that whoever
works on a piece need not know of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from repbend_fast.data.records import Sequence
from repbend_fast.models.layers.packing import Packed, known_on_host, pack, to_device
from repbend_fast.objectives.terms import Span, Term, ranges_of

Layout = Literal["padded", "packed"]


@dataclass(frozen=True)
class Piece:
    """``members[i]`` (index into the stream) starts at flat position ``offsets[i]`` of ``input_ids`` [B, T] (int64).

    ``packed`` has the sequences that share the row, those of other pieces too; None where each has one of its own.
    ``stop``: the flat position behind the last that is this piece's; it begins at ``offsets[0]``. ``tokens``: its own,
    without padding, those that it shares counted for each.

    ``shared``: so many first positions of every sequence of the batch are the batch's first, once for all; a member's
    others begin at its offset.
    """

    members: tuple[int, ...]
    offsets: tuple[int, ...]
    input_ids: Tensor
    packed: Packed | None
    tokens: int
    stop: int
    shared: int = 0

    @property
    def positions(self) -> int:
        """Positions that the decoder runs for it, padding included."""
        return self.stop - self.offsets[0]

    def places(self) -> Tensor:
        """What each of its flat positions is, whatever the layout: index in the stream · 2³² + position in the
        sequence, int64 [positions].
        """
        places = [m * 2**32 + position for m, room in zip(self.members, self.rooms) for position in range(room)]
        return to_device(torch.tensor(places, dtype=torch.int64), self.input_ids.device)

    @property
    def rooms(self) -> tuple[int, ...]:
        """Positions of each member's place, padding included."""
        return tuple(stop - start for start, stop in zip(self.offsets, (*self.offsets[1:], self.stop)))

    def rows(self, spans: tuple[Span, ...]) -> Tensor:
        """Flat row indices (int64 [R], on the piece's device) of the stream's ``spans`` that lie in this piece, but for
        rows of a beginning that its members share.
        """
        parts = [
            torch.arange(offset + max(start - self.shared, 0), offset + max(stop - self.shared, 0))
            for member, offset in zip(self.members, self.offsets)
            for start, stop in ranges_of(spans[member])
        ]
        return to_device(torch.cat(parts), self.input_ids.device)

    def shared_rows(self, spans: tuple[Span, ...]) -> Tensor:
        """Flat row indices of the shared beginning that the ``spans`` have, each of all members: int64 [S]."""
        parts = [torch.arange(start, stop) for start, stop in beginning_of(spans[self.members[0]], self.shared)]
        return to_device(torch.cat([torch.arange(0), *parts]), self.input_ids.device)


Part = tuple[tuple[Sequence, ...], tuple[int, ...]]
"""A stream's sequences, and the members of a piece of it."""


def make_piece(
    sequences: tuple[Sequence, ...], members: tuple[int, ...], layout: Layout, device: torch.device
) -> Piece:
    """Lay out ``members`` of ``sequences``. Padding repeats id 0: rows on the right of a sequence never influence it.

    Sequences of one length are not packed: there is no padding to save.
    """
    (piece,) = make_pieces([(sequences, members)], layout, device)
    return piece


def make_pieces(parts: Seq[Part], layout: Layout, device: torch.device, shared: int = 0) -> list[Piece]:
    """Lay out pieces of several streams in one batch, one behind the other; ``shared`` first tokens, the same in all of
    their sequences, once before them.
    """
    chosen = [sequences[m].ids for sequences, members in parts for m in members]
    lengths = [len(ids) for ids in chosen]
    packed: Packed | None = None
    if shared or (layout == "packed" and len(set(lengths)) > 1):
        sizes = [length - shared for length in lengths]
        own = [token for sequence in chosen for token in sequence[shared:]]
        ids = torch.tensor([*chosen[0][:shared], *own], dtype=torch.int64)[None]
        packed = pack(sizes, device, shared)
    else:
        sizes = [max(lengths)] * len(lengths)
        ids = torch.zeros(len(chosen), max(lengths), dtype=torch.int64)
        for i, sequence in enumerate(chosen):
            ids[i, : lengths[i]] = torch.tensor(sequence, dtype=torch.int64)
    ids, offsets = known_on_host(ids, device), list(accumulate(sizes, initial=shared))
    pieces, first = [], 0
    for _, members in parts:
        last = first + len(members)
        tokens = sum(lengths[first:last])
        pieces.append(Piece(members, tuple(offsets[first:last]), ids, packed, tokens, offsets[last], shared))
        first = last
    return pieces


LEAST_SHARED = 8
"""Tokens: a shorter beginning saves less than laying it out costs."""


def beginning_of(span: Span, length: int) -> list[tuple[int, int]]:
    """The ranges of ``span`` within the first ``length`` positions."""
    return [(start, min(stop, length)) for start, stop in ranges_of(span) if start < min(stop, length)]


def shared_beginning(parts: Seq[tuple[Part, tuple[Term, ...]]]) -> int:
    """How many first tokens a batch of these parts, each with its stream's terms, can have once for all sequences.

    They are the same in all, every sequence goes on behind them, and no term reads them but those that count a row for
    all members, where it reads the same ones of each.
    """
    chosen = [sequences[m].ids for (sequences, members), _ in parts for m in members]
    if len(chosen) < 2:
        return 0
    length = min(map(len, chosen)) - 1
    length = next((i for i in range(length) if any(ids[i] != chosen[0][i] for ids in chosen)), length)
    for (_, members), terms in parts:
        for term in terms:
            if not term.takes_shared:
                return 0
            spans = [term.spans[m] for m in members]
            if term.counts_shared and len({tuple(beginning_of(span, length)) for span in spans}) == 1:
                continue
            length = min([length, *(start for span in spans for start, stop in ranges_of(span) if start < stop)])
    return length if length >= LEAST_SHARED else 0


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


@dataclass(frozen=True)
class Cut:
    """A piece before it is laid out: of which stream, by number; its members, and their lengths; and the most
    positions of a batch that it may be in, None for any.
    """

    stream: int
    members: tuple[int, ...]
    lengths: tuple[int, ...]
    limit: int | None = None


def batches(pieces: Seq[Cut], layout: Layout, merged: bool) -> list[list[Cut]]:
    """The pieces that share a batch: each alone, or ``merged`` with pieces of other streams, in their order.

    A batch holds one piece of a stream, and no more positions, padding included, than each of its pieces allows. The
    first batch that has room takes a piece.
    """
    found: list[list[Cut]] = []
    for piece in pieces:
        home = next((batch for batch in found if merged and _has_room(batch, piece, layout)), None)
        if home is None:
            found.append([piece])
        else:
            home.append(piece)
    return found


def _has_room(batch: list[Cut], piece: Cut, layout: Layout) -> bool:
    if any(other.stream == piece.stream for other in batch):
        return False
    everything = [*batch, piece]
    lengths = [length for part in everything for length in part.lengths]
    positions = sum(lengths) if layout == "packed" else len(lengths) * max(lengths)
    return all(positions <= (math.inf if part.limit is None else part.limit) for part in everything)
