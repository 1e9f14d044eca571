"""The reference pass: trained adapter off, no gradient, and only the rows kept that a term compares."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from repbend_fast.models.decoder import run_decoder
from repbend_fast.models.layers.switches import reference_model
from repbend_fast.objectives.base import Distance, Stream
from repbend_fast.step.answers import answer_log_probs
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.pieces import Layout, Piece, make_piece, to_device
from repbend_fast.step.triplets import triplet_rows


@dataclass
class ReferenceRows:
    """What is kept of a piece's reference pass.

    Rows per (number of the distance, hidden state), for the triplets per hidden state (safe rows, then unsafe ones), for the
    head; and the log-probabilities of the answers, [members].
    """

    distances: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    triplets: dict[int, Tensor] = field(default_factory=dict)
    head: Tensor | None = None
    answers: Tensor | None = None


def reference_pass(parts: ModelParts, stream: Stream, piece: Piece, layout: Layout, chunk_rows: int | None = None) -> ReferenceRows:
    """What the stream's terms compare with; nothing runs where no term does, nor beyond the last hidden state that one reads."""
    kept = ReferenceRows()
    last = parts.decoder.num_blocks
    # A stream may stop before its pairwise layers, which have no reference.
    stop = stream.reference_stop(last)
    if stop == 0:
        return kept
    rows = [piece.rows(term.spans) for term in stream.distances]
    triplets = torch.cat(triplet_rows(stream.triplets, piece)) if stream.triplets else None

    def visit(layer: int, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        for i, term in enumerate(stream.distances):
            if layer in term.layers and term.target is None:
                kept.distances[i, layer] = flat[rows[i]]
        if stream.triplets and layer in stream.triplets.layers:
            kept.triplets[layer] = flat[triplets]
        if stream.answers and stream.answers.beta is not None and layer == last:
            assert parts.head is not None
            states = flat[piece.rows(stream.answers.spans)]
            kept.answers = answer_log_probs(parts.head, stream.answers, piece, states, chunk_rows)
        if stream.head and layer == last:
            kept.head = flat[piece.rows(stream.head.spans)]
        return hidden

    with reference_model(parts.model), parts.autocasting():
        run_decoder(parts.decoder, piece.input_ids, position_ids=piece.position_ids, stop=stop, visit=visit)
        for i, term in enumerate(stream.distances):
            if term.against is not None:
                _replace_against(parts, term, i, stream, piece, layout, kept)
    return kept


def _replace_against(
    parts: ModelParts, term: Distance, number: int, stream: Stream, piece: Piece, layout: Layout, kept: ReferenceRows
) -> None:
    """Take reference rows after the shared prompt from the other answer.

    Rows of the prompt itself are equal by causality and stay those of this piece's own pass: the same shapes give the
    same bits, so their distance at B = 0 is exactly zero.
    """
    assert term.against is not None
    others, theirs, target = [], [], []
    position = 0
    for member in piece.members:
        start, stop = term.spans[member]
        other = term.against[member]
        if other is not None:
            first = max(start, stream.sequences[member].prompt_length)
            if first < stop:
                others.append(other)
                theirs.append((first, stop))
                target.append(torch.arange(position + first - start, position + stop - start))
        position += stop - start
    if not others:
        return
    other_piece = make_piece(tuple(others), tuple(range(len(others))), layout, parts.device)
    source, into = other_piece.rows(tuple(theirs)), to_device(torch.cat(target), parts.device)

    def visit(layer: int, hidden: Tensor) -> Tensor:
        if layer in term.layers:
            kept.distances[number, layer][into] = hidden.reshape(-1, hidden.shape[-1])[source]
        return hidden

    run_decoder(parts.decoder, other_piece.input_ids, position_ids=other_piece.position_ids, stop=max(term.layers), visit=visit)
