"""The KL divergence of the adapted logits from the reference's, from hidden states and the frozen head."""

from __future__ import annotations

import torch
from repbend_kernels import linear_kl_div, tap_rows
from torch import Tensor

from repbend_fast.objectives.terms import HeadKL
from repbend_fast.step.pieces import beginning_of
from repbend_fast.step.terms.execution import Execution, Place, executes


@executes(HeadKL)
class HeadKLExecution(Execution[HeadKL]):
    """``kept`` holds the reference's last hidden state at the term's rows; those of a beginning that the piece's
    members share come last, and count for each of them.
    """

    def __init__(self, term: HeadKL, place: Place, sums: object = None) -> None:
        super().__init__(term, place, sums)
        self._states: list[Tensor] = []
        piece = place.piece
        self._shared = sum(stop - start for start, stop in beginning_of(term.spans[piece.members[0]], piece.shared))

    @property
    def rows(self) -> Tensor:
        piece, spans = self.place.piece, self.term.spans
        if self._rows is None and self._shared:
            self._rows = torch.cat((piece.rows(spans), piece.shared_rows(spans)))
        return super().rows

    def tap(self, layer: int, hidden: Tensor) -> Tensor:
        hidden, gathered = tap_rows(hidden, self.rows)
        self._states.append(gathered)
        return hidden

    def losses(self) -> list[Tensor]:
        parts, term = self.place.parts, self.term
        assert parts.head is not None
        head = parts.head.on(parts.device)
        (reference,) = self.kept.values()

        def divergence(states: Tensor, reference: Tensor) -> Tensor:
            return linear_kl_div(
                head.inputs(states),
                head.inputs(reference),
                head.weight,
                bias=head.bias,
                temperature=term.temperature,
                softcap=head.softcap,
                reduction="sum",
                chunk_rows=self.place.levers.kl_chunk_rows,
            )

        states = self._states.pop()
        own = states.shape[0] - self._shared
        kl = divergence(states[:own], reference[:own])
        if self._shared:
            kl = kl + len(self.place.piece.members) * divergence(states[own:], reference[own:])
        self.place.meter.add(term.name, kl.detach() / term.denominator)
        return [kl * (term.weight / term.denominator)]
