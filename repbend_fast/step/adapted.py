"""The adapted pass: taps between the blocks, and the loss of one piece."""

from __future__ import annotations

import torch
from repbend_kernels import bend_tap, linear_kl_div, pairwise_cosine, tap_rows
from torch import Tensor

from repbend_fast.models.decoder import run_decoder
from repbend_fast.models.layers.offload import host_states
from repbend_fast.objectives.base import Direction, HeadKL, PairwiseCosine, Stream
from repbend_fast.step.answers import answer_log_probs, answer_loss
from repbend_fast.step.levers import Levers
from repbend_fast.step.meter import Meter
from repbend_fast.step.pairwise import PairwiseSums, last_prompt_spans, pairwise_share, sums_of
from repbend_fast.step.parts import ModelParts
from repbend_fast.step.pieces import Piece, to_device
from repbend_fast.step.reference import ReferenceRows
from repbend_fast.step.triplets import TripletSums, triplet_rows, triplet_tap


def adapted_pass(
    parts: ModelParts,
    stream: Stream,
    piece: Piece,
    reference: ReferenceRows,
    sums: PairwiseSums | None,
    levers: Levers,
    meter: Meter,
    triplet_sums: dict[int, TripletSums] | None = None,
) -> Tensor:
    """The piece's share of the stream's weighted loss, differentiable in the adapter.

    Args:
        reference: what the reference pass kept; used up, its buffers become gradient directions.
        sums, triplet_sums: over the whole stream, where it is split and has a term that couples its sequences. ``sums`` may lack this
            piece's own sequences, which are then added to it.
        meter: receives the piece's terms.
    """
    taps = _Taps(parts, stream, piece, reference, triplet_sums, meter)
    with parts.autocasting():
        run_decoder(
            parts.decoder,
            piece.input_ids,
            position_ids=piece.position_ids,
            stop=stream.stop(parts.decoder.num_blocks),
            visit=taps.visit,
            checkpoint_blocks=levers.checkpoint_blocks,
            offload=host_states(levers.offload_checkpoints, parts.device),
        )
    losses = taps.losses
    if stream.pairwise:
        states = [taps.pairwise_states[layer] for layer in stream.pairwise.layers]
        if sums is not None and sums.count < len(stream.sequences):
            sums.add(sums_of(states))
        losses.append(_cosine(stream.pairwise, states, sums, meter))
    if stream.head:
        assert reference.head is not None
        losses.append(_head_kl(parts, stream.head, taps.head_states[0], reference.head, levers, meter))
    if stream.answers:
        assert parts.head is not None
        log_probs = answer_log_probs(parts.head, stream.answers, piece, taps.answer_states[0], levers.kl_chunk_rows)
        value = answer_loss(stream.answers, log_probs, reference.answers)
        meter.add(stream.answers.name, value.detach())
        losses.append(value * stream.answers.weight)
    return torch.stack(losses).sum()


class _Taps:
    """What the adapted pass of one piece does at each hidden state. ``losses`` are weighted; states are kept for the terms behind."""

    def __init__(
        self,
        parts: ModelParts,
        stream: Stream,
        piece: Piece,
        reference: ReferenceRows,
        triplet_sums: dict[int, TripletSums] | None,
        meter: Meter,
    ) -> None:
        self.parts, self.stream, self.piece, self.reference, self.meter = parts, stream, piece, reference, meter
        self.triplet_sums = triplet_sums
        self.last = parts.decoder.num_blocks
        self.rows = [piece.rows(term.spans) for term in stream.distances]
        self.halves = triplet_rows(stream.triplets, piece) if stream.triplets else None
        self.losses: list[Tensor] = []
        self.pairwise_states: dict[int, Tensor] = {}
        self.head_states: list[Tensor] = []
        self.answer_states: list[Tensor] = []

    def visit(self, layer: int, hidden: Tensor) -> Tensor:
        """Tap hidden state ``layer`` for every term that reads it."""
        stream = self.stream
        for i, term in enumerate(stream.distances):
            if layer in term.layers:
                power = term.unit_power
                unit = self.parts.unit(layer, power)
                length = self.parts.unit(layer, min(power, 1))
                compared = fixed_row(term.target, hidden, length) if term.target else self.reference.distances.pop((i, layer))
                hidden, distance = bend_tap(hidden, compared, self.rows[i], kind=term.kind, limit=term.limit)
                self.losses.append(distance * (term.weight / term.denominator / unit))
                self.meter.add_distance(i, layer, distance.detach() / unit if power else distance)
        if stream.triplets and self.halves and layer in stream.triplets.layers:
            sums = None if self.triplet_sums is None else self.triplet_sums[layer]
            reference = self.reference.triplets.pop(layer)
            unit = self.parts.unit(layer, stream.triplets.unit_power)
            hidden, loss = triplet_tap(stream.triplets, layer, hidden, reference, self.halves, sums, self.meter, unit)
            self.losses.append(loss)
        if stream.pairwise and layer in stream.pairwise.layers:
            hidden, self.pairwise_states[layer] = tap_rows(hidden, self.piece.rows(last_prompt_spans(stream.pairwise)))
        if layer == self.last:
            for head_term, kept in ((stream.head, self.head_states), (stream.answers, self.answer_states)):
                if head_term:
                    hidden, gathered = tap_rows(hidden, self.piece.rows(head_term.spans))
                    kept.append(gathered)
        return hidden


def fixed_row(direction: Direction, hidden: Tensor, unit: float = 1.0) -> Tensor:
    """The row c·u that a term with a fixed target compares with, [1, D], the same on every device; c is a multiple of ``unit``."""
    row = torch.rand(hidden.shape[-1], generator=torch.Generator().manual_seed(direction.seed), dtype=torch.float32).double()
    return to_device((row * (direction.length * unit / torch.linalg.vector_norm(row)))[None].to(hidden.dtype), hidden.device)


def _cosine(term: PairwiseCosine, states: list[Tensor], sums: PairwiseSums | None, meter: Meter) -> Tensor:
    if sums is not None:
        return pairwise_share(term, states, sums)
    value = pairwise_cosine(states)
    meter.add(term.name, value.detach())
    return value * term.weight


def _head_kl(parts: ModelParts, term: HeadKL, hidden: Tensor, reference: Tensor, levers: Levers, meter: Meter) -> Tensor:
    assert parts.head is not None
    head = parts.head.on(parts.device)
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
