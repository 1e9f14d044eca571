"""UNDIAL, unlearning by self-distillation with adjusted logits (Dong et al., NAACL 2025, arXiv 2402.10052; settings of
open-unlearning).

    L = forget·mean_t −Σ_v q_v log p_v + retain_nll·NLL/tokens + retain_kl·K,    q = softmax(z_ref − strength·1[label])

t runs over the answer tokens of the forget sequences; z_ref are the reference's logits, and the label is the token that
follows.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from repbend_fast.data.records import Sequence
from repbend_fast.objectives.forgetting import Forgetting
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import count, predicting_rows
from repbend_fast.objectives.sections import ForgettingConfig
from repbend_fast.objectives.terms import LoweredLabel, Term
from repbend_fast.section import AboveZero


class UNDIALConfig(ForgettingConfig):
    """UNDIAL: L = forget·mean CE(p, softmax(z_ref − strength·1[label])) on forget (+ retain terms)."""

    place: ClassVar[int] = 10

    name: Literal["undial"] = "undial"
    strength: AboveZero = Field(10.0, description="What the label's logit is lowered by in what is learned instead.")
    forget: AboveZero = Field(1.0, description="Weight of the cross-entropy.")


@method(UNDIALConfig)
class UNDIAL(Forgetting[UNDIALConfig]):
    """Stream ``forget``, and ``retain`` where its term has a weight."""

    def forget(self, sequences: tuple[Sequence, ...]) -> Term:
        config, spans = self.config, predicting_rows(sequences, self.config.loss_mode)
        return LoweredLabel("forget", spans, config.forget, count(spans), config.strength)
