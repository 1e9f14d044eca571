"""SimNPO, negative preference without a reference (Fan et al., arXiv 2410.07163; settings of open-unlearning).

    L = forget·(−2/β)·mean_i log σ(β (NLL_i/|y_i| − δ)) + retain_nll·NLL/tokens + retain_kl·K

NLL_i sums over the |y_i| answer tokens of forget sequence i.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from repbend_fast.data.records import Sequence
from repbend_fast.objectives.forgetting import Forgetting
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import predicting_rows
from repbend_fast.objectives.sections import ForgettingConfig
from repbend_fast.objectives.terms import SimplePreference, Term
from repbend_fast.section import AboveZero, Weight


class SimNPOConfig(ForgettingConfig):
    """SimNPO: L = −forget·(2/β)·mean log σ(β(NLL/|y| − δ)) on forget + retain terms."""

    place: ClassVar[int] = 6

    name: Literal["simnpo"] = "simnpo"
    beta: AboveZero = Field(4.5, description="How sharply the loss falls off once an answer has become unlikely.")
    delta: Weight = Field(0.0, description="NLL per token from which an answer counts as unlikely.")
    forget: AboveZero = Field(0.125, description="Weight of the negative preference.")
    retain_nll: Weight = Field(1.0, description="Weight of the retain answers' negative log-likelihood.")


@method(SimNPOConfig)
class SimNPO(Forgetting[SimNPOConfig]):
    """Stream ``forget``, and ``retain`` where its term has a weight."""

    def forget(self, sequences: tuple[Sequence, ...]) -> Term:
        config, spans = self.config, predicting_rows(sequences, self.config.loss_mode)
        return SimplePreference("forget", spans, config.forget, max(1, len(sequences)), config.beta, config.delta)
