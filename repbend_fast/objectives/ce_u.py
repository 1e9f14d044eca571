"""CE-U, cross-entropy unlearning (Yang, arXiv 2503.01224; settings of open-unlearning).

    L = forget·mean_t −Σ_v q_v log p_v + retain_nll·NLL/tokens + retain_kl·K,    q = softmax(z without the label)

t runs over the answer tokens of the forget sequences but the first of each. z are the adapted model's own logits; q is
a constant to the gradient.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from repbend_fast.data.records import Sequence
from repbend_fast.objectives.forgetting import Forgetting
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import count, predicting_rows
from repbend_fast.objectives.sections import ForgettingConfig
from repbend_fast.objectives.terms import LoweredLabel, Span, Term, ranges_of
from repbend_fast.section import AboveZero, NonNegative


class CEUConfig(ForgettingConfig):
    """CE-U: L = forget·mean CE(p, own soft-max without the label) on forget (+ retain terms)."""

    place: ClassVar[int] = 11

    name: Literal["ce_u"] = "ce_u"
    skipped_tokens: NonNegative = Field(1, description="First tokens of each answer that do not count.")
    forget: AboveZero = Field(1.0, description="Weight of the cross-entropy.")


@method(CEUConfig)
class CEU(Forgetting[CEUConfig]):
    """Stream ``forget``, and ``retain`` where its term has a weight."""

    def forget(self, sequences: tuple[Sequence, ...]) -> Term:
        config = self.config
        spans = tuple(self._rest(span) for span in predicting_rows(sequences, config.loss_mode))
        return LoweredLabel("forget", spans, config.forget, count(spans), math.inf, own=True)

    def _rest(self, span: Span) -> Span:
        """The rows without the first of each turn that do not count."""
        return tuple(
            p for start, stop in ranges_of(span) for p in (min(start + self.config.skipped_tokens, stop), stop)
        )
