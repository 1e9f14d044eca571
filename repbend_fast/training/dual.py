"""The weight of the retain KL from a limit instead of by hand: dual ascent.

    λ ← min(λ_max, max(0, λ + rate · (K − limit)))      after each step, from λ = the term's weight

K is the step's KL term in its own reduction, averaged over the micro-batches. While K is above the limit the weight
grows, and the next steps hold ordinary answers more firmly; while it is below, the weight falls and bending has its
way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from repbend_fast.objectives.sections import KL_TERM, KLLimitConfig, MethodConfig
from repbend_fast.objectives.streams import Stream
from repbend_fast.step import StreamResult

RATE = 0.05
"""Default rate: a step at twice the limit changes the weight by this share of the one that it started from."""
HIGHEST = 10.0
"""Default bound: this multiple of the weight that it started from."""


@dataclass
class KLWeight:
    """λ (``value``) and how it moves."""

    value: float
    limit: float
    rate: float
    highest: float

    @classmethod
    def of(cls, config: MethodConfig) -> KLWeight | None:
        """That of an objective's settings; None where no limit is set."""
        if not isinstance(config, KLLimitConfig) or config.kl_limit is None:
            return None
        start = config.kl_weight
        return cls(
            start, config.kl_limit, config.kl_rate or RATE * start / config.kl_limit, config.kl_max or HIGHEST * start
        )

    def weigh(self, stream: Stream) -> Stream:
        """The stream with λ as the weight of its KL, if it has one."""
        return stream.weighed(KL_TERM, self.value)

    def measured(self, streams: list[Stream], results: list[StreamResult], accumulation: int) -> Tensor | None:
        """K of a step as a device scalar, None without a KL: reading it is left to the trainer, who waits for the
        device anyway.
        """
        found = [
            result.terms[KL_TERM].float()
            for stream, result in zip(streams, results, strict=True)
            if stream.term(KL_TERM)
        ]
        return torch.stack(found).sum() / accumulation if found else None

    def update(self, kl: float) -> None:
        """Move λ behind a step whose KL was ``kl``; one that is not finite leaves it as it is."""
        if math.isfinite(kl):
            self.value = min(self.highest, max(0.0, self.value + self.rate * (kl - self.limit)))

    def set(self, value: float) -> None:
        """Go on from a checkpoint's λ, within this run's bound."""
        self.value = min(self.highest, value)
