"""Gradient ascent weighted by token: WGA (Wang et al., ICLR 2025, arXiv 2502.19301) and SatImp (Yang et al., ICML 2025,
arXiv 2505.11953); settings of open-unlearning.

    L = forget·mean_t w_t log p_t + retain_nll·NLL/tokens + retain_kl·K,    w_t = p_t^power (1 − p_t)^rest_power

p_t is the probability of answer token t of a forget sequence; w_t is a constant to the gradient. WGA has power alone.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from repbend_fast.data.records import Sequence
from repbend_fast.objectives.forgetting import Forgetting
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import count, predicting_rows
from repbend_fast.objectives.sections import ForgettingConfig
from repbend_fast.objectives.terms import Term, WeightedAscent
from repbend_fast.section import AboveZero, Weight

POWER = "Power of the token's probability in its weight: likely tokens count most."
REST_POWER = "Power of one minus that: tokens that are certain count less."


class AscentConfig(ForgettingConfig):
    """What both have."""

    power: Weight = Field(1.0, description=POWER)
    rest_power: Weight = Field(0.0, description=REST_POWER)
    forget: AboveZero = Field(1.0, description="Weight of the ascent.")
    retain_nll: Weight = Field(1.0, description="Weight of the retain answers' negative log-likelihood.")


class WGAConfig(AscentConfig):
    """WGA: L = forget·mean p^power log p on forget + retain terms."""

    place: ClassVar[int] = 7
    name: Literal["wga"] = "wga"


class SatImpConfig(AscentConfig):
    """SatImp: L = forget·mean p^power (1 − p)^rest_power log p on forget + retain terms."""

    place: ClassVar[int] = 8
    name: Literal["sat_imp"] = "sat_imp"
    power: Weight = Field(5.0, description=POWER)
    rest_power: Weight = Field(1.0, description=REST_POWER)
    forget: AboveZero = Field(0.1, description="Weight of the ascent.")


@method(WGAConfig)
@method(SatImpConfig)
class WeightedTokens(Forgetting[AscentConfig]):
    """Stream ``forget``, and ``retain`` where its term has a weight."""

    def forget(self, sequences: tuple[Sequence, ...]) -> Term:
        config, spans = self.config, predicting_rows(sequences, self.config.loss_mode)
        return WeightedAscent("forget", spans, config.forget, count(spans), config.power, config.rest_power)
