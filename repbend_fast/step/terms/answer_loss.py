"""Losses on the log-likelihood of answers: negative preference, and plain negative log-likelihood."""

from __future__ import annotations

import torch
from repbend_kernels import linear_log_prob, tap_rows
from torch import Tensor

from repbend_fast.objectives.terms import AnswerLoss
from repbend_fast.step.terms.execution import Execution, Place, executes


@executes(AnswerLoss)
class AnswerLossExecution(Execution[AnswerLoss]):
    """``reference``: with ``beta``, the log-probabilities with the adapter off, [members]."""

    def __init__(self, term: AnswerLoss, place: Place, sums: object = None) -> None:
        super().__init__(term, place, sums)
        self.reference: Tensor | None = None
        self._states: list[Tensor] = []

    def keep(self, layer: int, hidden: Tensor) -> None:
        self.reference = self._log_probs(hidden.reshape(-1, hidden.shape[-1])[self.rows])

    def tap(self, layer: int, hidden: Tensor) -> Tensor:
        hidden, gathered = tap_rows(hidden, self.rows)
        self._states.append(gathered)
        return hidden

    def losses(self) -> list[Tensor]:
        value = self._loss(self._log_probs(self._states.pop()))
        self.place.meter.add(self.term.name, value.detach())
        return [value * self.term.weight]

    def _log_probs(self, states: Tensor) -> Tensor:
        """log p of each member's answer, [members], from the ``states`` [R, D] at the term's rows."""
        piece, head = self.place.piece, self.place.parts.head
        assert head is not None
        lengths = [self.term.rows_of((member,)) for member in piece.members]
        # The next position of a row is its own sequence's: spans end before the last token.
        targets = piece.input_ids.reshape(-1)[self.rows + 1]
        head = head.on(states.device)
        chunk_rows = self.place.levers.kl_chunk_rows
        return linear_log_prob(
            states, head.weight, targets, bias=head.bias, softcap=head.softcap, lengths=lengths, chunk_rows=chunk_rows
        )

    def _loss(self, log_probs: Tensor) -> Tensor:
        """The piece's share of the unweighted term."""
        term = self.term
        if term.beta is None:
            return -log_probs.sum() / term.denominator
        assert self.reference is not None
        # NLL − NLL_ref
        gap = self.reference - log_probs
        return torch.nn.functional.logsigmoid(term.beta * gap).sum() * (-2.0 / (term.beta * term.denominator))
