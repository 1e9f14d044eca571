"""Perplexity and KL to the reference on held-out conversations: what bending did to ordinary language."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from repbend_kernels import linear_kl_div, linear_log_prob
from torch import Tensor

from repbend_fast.data.records import Sequence
from repbend_fast.models import reference_model, run_decoder
from repbend_fast.models.layers.packing import Packed
from repbend_fast.step import StreamRunner
from repbend_fast.step.pieces import make_piece, split

PIECE_TOKENS = 4096


@dataclass(frozen=True)
class ChatStatistics:
    """``perplexity`` of the tokens after the first; ``kl`` = KL(reference ‖ adapted) per token in nats, T = 1."""

    perplexity: float
    kl: float
    tokens: int


@torch.no_grad()
def chat_statistics(runner: StreamRunner, conversations: Seq[Sequence]) -> ChatStatistics:
    """Measure the adapted model (dropout off) on whole conversations.

    Args:
        runner: built with ``uses_head=True``.
        conversations: token ids; all positions count, template included. The runner's processes share them, unless
            a pass needs all of them.
    """
    assert runner.head is not None
    log_probability = torch.zeros((), dtype=torch.float64, device=runner.device)
    divergence = torch.zeros_like(log_probability)
    predicted = tokens = 0
    sequences = tuple(conversations)
    shared = runner.ranks.several and not runner.ranks.lockstep
    own = runner.ranks.shares([len(s) for s in sequences])[runner.ranks.number] if shared else None
    for members in split(sequences, runner.levers.piece_size("retain") or PIECE_TOKENS, runner.layout, own):
        piece = make_piece(sequences, members, runner.layout, runner.device)
        spans = tuple((0, len(s)) for s in sequences)
        rows = piece.rows(spans)
        head = runner.head.on(runner.device)
        adapted = head.inputs(_final_rows(runner, piece.input_ids, piece.packed, rows))
        with reference_model(runner.model):
            reference = head.inputs(_final_rows(runner, piece.input_ids, piece.packed, rows))
        chunk = runner.levers.kl_chunk_rows
        divergence += linear_kl_div(
            adapted, reference, head.weight, bias=head.bias, softcap=head.softcap, chunk_rows=chunk
        )
        lengths = [len(sequences[m]) for m in members]
        inner, targets = _next_tokens(piece.input_ids.reshape(-1)[rows], lengths)
        scores = linear_log_prob(
            adapted[inner], head.weight, targets, bias=head.bias, softcap=head.softcap, chunk_rows=chunk
        )
        log_probability += scores.sum()
        predicted += len(targets)
        tokens += sum(lengths)
    if shared:
        counts = torch.tensor([predicted, tokens])
        log_probability, divergence, counts = runner.ranks.totals([log_probability, divergence, counts])
        predicted, tokens = (int(count) for count in counts)
    # exp overflows beyond 709 nats per token; a model that is that ruined has an infinite perplexity, not a traceback.
    nats = -float(log_probability) / max(1, predicted)
    return ChatStatistics(math.exp(nats) if not nats > 700 else math.inf, float(divergence) / max(1, tokens), tokens)


def _final_rows(runner: StreamRunner, input_ids: Tensor, packed: Packed | None, rows: Tensor) -> Tensor:
    kept: list[Tensor] = []
    last = runner.decoder.num_blocks

    def visit(layer: int, hidden: Tensor) -> Tensor:
        if layer == last:
            kept.append(hidden.reshape(-1, hidden.shape[-1])[rows])
        return hidden

    with runner.autocasting():
        run_decoder(runner.decoder, input_ids, packed=packed, stop=last, visit=visit)
    return kept[0]


def _next_tokens(ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Row indices that predict a next token of the same conversation, and those tokens."""
    ends = torch.tensor(lengths, device=ids.device).cumsum(0) - 1
    inner = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    inner[ends] = False
    index = inner.nonzero().squeeze(1)
    return index, ids[index + 1]
