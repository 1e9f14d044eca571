"""The cross-entropy to a distribution in which the following token is less likely, from hidden states and the frozen
head.
"""

from __future__ import annotations

from repbend_kernels import linear_lowered_label, tap_rows
from torch import Tensor

from repbend_fast.objectives.terms import LoweredLabel
from repbend_fast.step.terms.execution import Execution, Place, executes


@executes(LoweredLabel)
class LoweredLabelExecution(Execution[LoweredLabel]):
    """``kept`` holds the reference's last hidden state at the term's rows, and nothing where the target is the model's
    own.
    """

    def __init__(self, term: LoweredLabel, place: Place, sums: object = None) -> None:
        super().__init__(term, place, sums)
        self._states: list[Tensor] = []

    def tap(self, layer: int, hidden: Tensor) -> Tensor:
        hidden, gathered = tap_rows(hidden, self.rows)
        self._states.append(gathered)
        return hidden

    def losses(self) -> list[Tensor]:
        parts, term = self.place.parts, self.term
        assert parts.head is not None
        head = parts.head.on(parts.device)
        (reference,) = self.kept.values() if self.kept else (None,)
        losses = linear_lowered_label(
            head.inputs(self._states.pop()),
            head.weight,
            # The next position of a row is its own sequence's: spans end before the last token.
            self.place.piece.input_ids.reshape(-1)[self.rows + 1],
            lowered=term.lowered,
            reference=None if reference is None else head.inputs(reference),
            bias=head.bias,
            softcap=head.softcap,
            chunk_rows=self.place.levers.kl_chunk_rows,
        )
        value = losses.sum() / term.denominator
        self.place.meter.add(term.name, value.detach())
        return [value * term.weight]
