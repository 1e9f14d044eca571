"""NPO, negative preference optimisation (Zhang et al., COLM 2024, arXiv 2404.05868).

    L = −(2/β)·mean_i log σ(β (NLL_i − NLL_ref,i)) + retain_nll·NLL/tokens + retain_kl·K

NLL_i sums over the answer tokens of forget sequence i. The retain terms, both off by default: the NLL per answer token,
and K = T²·KL(softmax(z_ref/T) ‖ softmax(z/T)) per answer token.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from repbend_fast.data.records import Sequence
from repbend_fast.objectives.choices import Quirks
from repbend_fast.objectives.forgetting import Forgetting
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import answer_rows, predicting_rows
from repbend_fast.objectives.sections import Entry, ForgettingConfig
from repbend_fast.objectives.terms import AnswerLoss, Span, Term
from repbend_fast.section import AboveZero


class NPOConfig(ForgettingConfig):
    """NPO: L = −(2/β)·mean log σ(β(NLL − NLL_ref)) on forget (+ retain terms)."""

    place: ClassVar[int] = 4
    published_names: ClassVar[dict[str, str]] = {
        "alpha": "objective.retain_nll",
        "loss_alpha": "objective.retain_nll",
        "beta": "objective.beta",
        "loss_beta": "objective.beta",
        "gamma": "objective.retain_kl",
        "loss_gamma": "objective.retain_kl",
    }

    name: Literal["npo"] = "npo"
    beta: AboveZero = Field(0.1, description="How sharply the loss falls off once an answer has become unlikely.")
    temperature: AboveZero = Field(2.0, description="Of the KL's soft-max.")
    published_quirks: Quirks = False

    @classmethod
    def recorded(cls, case: Entry, expected: Entry) -> NPOConfig:
        """See :class:`MethodConfig`."""
        if case["kl_reduction"] != "per label token":
            raise ValueError(f"kl_reduction {case['kl_reduction']!r}, expected 'per label token'")
        settings: dict[str, Any] = {key: float(case[key]) for key in ("beta", "retain_kl", "temperature")}
        return cls(**settings, published_quirks=True)


@method(NPOConfig)
class NPO(Forgetting[NPOConfig]):
    """Stream ``forget``, and ``retain`` where one of its terms has a weight."""

    def forget(self, sequences: tuple[Sequence, ...]) -> Term:
        spans = predicting_rows(sequences, self.config.loss_mode)
        return AnswerLoss("forget", spans, 1.0, max(1, len(sequences)), self.config.beta)

    def compared(self, sequences: tuple[Sequence, ...]) -> tuple[Span, ...]:
        # A slip of the published code: its KL reads the logits at the answer's tokens, one position after those that
        # predict them.
        return answer_rows(sequences) if self.config.published_quirks else super().compared(sequences)
