"""The adapted pass: taps between the blocks, and the loss of one piece."""

from __future__ import annotations

import torch
from repbend_kernels import bend_tap, linear_kl_div, pairwise_cosine, tap_rows
from torch import Tensor

from repbend_fast.memory.levers import Levers
from repbend_fast.models.decoder import run_decoder
from repbend_fast.objectives.base import HeadKL, PairwiseCosine, Stream
from repbend_fast.pieces import Piece
from repbend_fast.step.meter import Meter
from repbend_fast.step.pairwise import last_prompt_spans, pairwise_share
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.reference import ReferenceRows


def adapted_pass(
    parts: ModelParts, stream: Stream, piece: Piece, reference: ReferenceRows, sums: Tensor | None, levers: Levers, meter: Meter
) -> Tensor:
    """The piece's share of the stream's weighted loss, differentiable in the adapter.

    Args:
        reference: the piece's reference rows; used up, their buffers become gradient directions.
        sums: sums of the unit states over the whole stream, [layers, D], where the stream is split and has a pairwise term.
        meter: receives the piece's terms.
    """
    rows = [piece.rows(term.spans) for term in stream.distances]
    pairwise, head = stream.pairwise, stream.head
    prompt_rows = piece.rows(last_prompt_spans(pairwise)) if pairwise else None
    states: dict[int, Tensor] = {}
    head_rows: list[Tensor] = []
    losses: list[Tensor] = []

    def visit(layer: int, hidden: Tensor) -> Tensor:
        for i, term in enumerate(stream.distances):
            if layer in term.layers:
                hidden, distance = bend_tap(hidden, reference.distances.pop((i, layer)), rows[i], kind=term.kind)
                losses.append(distance * (term.weight / term.denominator))
                meter.add_distance(i, layer, distance)
        if pairwise and prompt_rows is not None and layer in pairwise.layers:
            hidden, states[layer] = tap_rows(hidden, prompt_rows)
        if head and layer == parts.decoder.num_blocks:
            hidden, gathered = tap_rows(hidden, piece.rows(head.spans))
            head_rows.append(gathered)
        return hidden

    with parts.autocasting():
        run_decoder(
            parts.decoder,
            piece.input_ids,
            position_ids=piece.position_ids,
            stop=stream.stop(parts.decoder.num_blocks),
            visit=visit,
            checkpoint_blocks=levers.checkpoint_blocks,
        )
    if pairwise:
        losses.append(_cosine(pairwise, [states[layer] for layer in pairwise.layers], len(stream.sequences), sums, meter))
    if head:
        assert reference.head is not None
        losses.append(_head_kl(parts, head, head_rows[0], reference.head, levers, meter))
    return torch.stack(losses).sum()


def _cosine(term: PairwiseCosine, states: list[Tensor], count: int, sums: Tensor | None, meter: Meter) -> Tensor:
    if sums is not None:
        return pairwise_share(term, states, count, sums)
    value = pairwise_cosine(states)
    meter.add(term.name, value.detach())
    return value * term.weight


def _head_kl(parts: ModelParts, term: HeadKL, hidden: Tensor, reference: Tensor, levers: Levers, meter: Meter) -> Tensor:
    head = parts.head
    assert head is not None
    kl = linear_kl_div(
        hidden,
        reference,
        head.weight,
        bias=head.bias,
        temperature=term.temperature,
        softcap=head.softcap,
        reduction="sum",
        chunk_rows=levers.kl_chunk_rows,
    )
    meter.add(term.name, kl.detach() / term.denominator)
    return kl * (term.weight / term.denominator)
