"""Losses on the log-likelihood of answers: plain negative log-likelihood, negative preference, weighted ascent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from repbend_kernels import linear_log_prob, tap_rows
from torch import Tensor

from repbend_fast.objectives.terms import AnswerLoss, HeadTerm, SimplePreference, Unlikelihood, WeightedAscent
from repbend_fast.step.terms.execution import Execution, Place, executes

T = TypeVar("T", bound=HeadTerm, covariant=True)

CERTAIN = 1 - 1e-6
"""The largest probability of a token that is to be avoided which the loss tells apart from 1."""


def avoiding(log_probs: Tensor) -> Tensor:
    """−log(1 − p) of tokens from their ``log_probs``."""
    return -torch.log1p(-log_probs.exp().clamp(max=CERTAIN))


class LikelihoodExecution(ABC, Execution[T]):
    """What reads the log-probability of the tokens that follow the term's rows."""

    def __init__(self, term: T, place: Place, sums: object = None) -> None:
        super().__init__(term, place, sums)
        self._states: list[Tensor] = []

    def tap(self, layer: int, hidden: Tensor) -> Tensor:
        hidden, gathered = tap_rows(hidden, self.rows)
        self._states.append(gathered)
        return hidden

    def losses(self) -> list[Tensor]:
        value = self._loss(self._log_probs(self._states.pop(), self._lengths()))
        self.place.meter.add(self.term.name, value.detach())
        return [value * self.term.weight]

    def _lengths(self) -> list[int]:
        """Rows whose log-probabilities are added up: each member's."""
        return [self.term.rows_of((member,)) for member in self.place.piece.members]

    def _log_probs(self, states: Tensor, lengths: list[int]) -> Tensor:
        """log p of each part of so many ``lengths``, from the ``states`` [R, D] at the term's rows."""
        piece, head = self.place.piece, self.place.parts.head
        assert head is not None
        # The next position of a row is its own sequence's: spans end before the last token.
        targets = piece.input_ids.reshape(-1)[self.rows + 1]
        head = head.on(states.device)
        chunk_rows = self.place.levers.kl_chunk_rows
        return linear_log_prob(
            head.inputs(states),
            head.weight,
            targets,
            bias=head.bias,
            softcap=head.softcap,
            lengths=lengths,
            chunk_rows=chunk_rows,
        )

    @abstractmethod
    def _loss(self, log_probs: Tensor) -> Tensor:
        """The piece's share of the unweighted term."""


@executes(AnswerLoss)
class AnswerLossExecution(LikelihoodExecution[AnswerLoss]):
    """``reference``: with ``beta``, the log-probabilities with the adapter off, [members]."""

    def __init__(self, term: AnswerLoss, place: Place, sums: object = None) -> None:
        super().__init__(term, place, sums)
        self.reference: Tensor | None = None

    def keep(self, layer: int, hidden: Tensor) -> None:
        self.reference = self._log_probs(hidden.reshape(-1, hidden.shape[-1])[self.rows], self._lengths())

    def _loss(self, log_probs: Tensor) -> Tensor:
        """The piece's share of the unweighted term."""
        term = self.term
        if term.beta is None:
            return -log_probs.sum() / term.denominator
        assert self.reference is not None
        # NLL − NLL_ref
        gap = self.reference - log_probs
        return torch.nn.functional.logsigmoid(term.beta * gap).sum() * (-2.0 / (term.beta * term.denominator))


@executes(SimplePreference)
class SimplePreferenceExecution(LikelihoodExecution[SimplePreference]):
    """Without a reference, so that its gradient is not small at the start."""

    def _loss(self, log_probs: Tensor) -> Tensor:
        term = self.term
        tokens = log_probs.new_tensor([max(1, length) for length in self._lengths()])
        per_token = -log_probs / tokens
        value = torch.nn.functional.logsigmoid(term.beta * (per_token - term.delta)).sum()
        return value * (-2.0 / (term.beta * term.denominator))


@executes(WeightedAscent)
class WeightedAscentExecution(LikelihoodExecution[WeightedAscent]):
    """Token by token."""

    def _lengths(self) -> list[int]:
        return [1] * len(self.rows)

    def _loss(self, log_probs: Tensor) -> Tensor:
        term = self.term
        likely = log_probs.detach().exp()
        weights = likely**term.power * (1.0 - likely) ** term.rest_power
        return (weights * log_probs).sum() / term.denominator


@executes(Unlikelihood)
class UnlikelihoodExecution(LikelihoodExecution[Unlikelihood]):
    """Token by token."""

    def _lengths(self) -> list[int]:
        return [1] * len(self.rows)

    def _loss(self, log_probs: Tensor) -> Tensor:
        return avoiding(log_probs).sum() / self.term.denominator
