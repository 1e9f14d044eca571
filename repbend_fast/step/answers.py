"""Losses on the log-likelihood of answers: negative preference, and plain negative log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from repbend_kernels import linear_log_prob
from torch import Tensor

from repbend_fast.models.decoder import Head
from repbend_fast.objectives.base import AnswerLoss
from repbend_fast.step.pieces import Piece


def answer_log_probs(head: Head, term: AnswerLoss, piece: Piece, states: Tensor, chunk_rows: int | None) -> Tensor:
    """log p of each member's answer, [members], from the ``states`` [R, D] at the term's rows of a piece."""
    rows = piece.rows(term.spans)
    lengths: Sequence[int] = [term.spans[m][1] - term.spans[m][0] for m in piece.members]
    # The next position of a row is its own sequence's: spans end before the last token.
    targets = piece.input_ids.reshape(-1)[rows + 1]
    head = head.on(states.device)
    return linear_log_prob(states, head.weight, targets, bias=head.bias, softcap=head.softcap, lengths=lengths, chunk_rows=chunk_rows)


def answer_loss(term: AnswerLoss, log_probs: Tensor, reference: Tensor | None) -> Tensor:
    """The piece's share of the unweighted term; ``reference`` holds the same log-probabilities with the adapter off."""
    if term.beta is None:
        return -log_probs.sum() / term.denominator
    assert reference is not None
    # NLL − NLL_ref
    gap = reference - log_probs
    return torch.nn.functional.logsigmoid(term.beta * gap).sum() * (-2.0 / (term.beta * term.denominator))
