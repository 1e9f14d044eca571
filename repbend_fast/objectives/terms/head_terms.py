"""Terms that read the logits of the frozen head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from repbend_fast.objectives.terms.state_terms import Distance
from repbend_fast.objectives.terms.term import KL_BOUND, Span, Term


class HeadTerm(Term):
    """A term that reads the logits of the frozen head."""

    reads_head: ClassVar[bool] = True
    takes_shared: ClassVar[bool] = True
    layers: ClassVar[tuple[int, ...]] = ()

    def start_probes(self, num_blocks: int) -> tuple[Distance, ...]:
        return (Distance(self.name, (num_blocks,), self.spans, 1.0, 1.0),) if self.compares_head else ()


@dataclass(frozen=True)
class HeadKL(HeadTerm):
    """``weight × T² Σ_rows KL(softmax(z_r/T) ‖ softmax(z/T)) / denominator`` on logits of the frozen head."""

    counts_shared: ClassVar[bool] = True

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    temperature: float

    @property
    def compares_head(self) -> bool:
        return True

    @property
    def start_bound(self) -> float | None:
        return KL_BOUND

    @property
    def described(self) -> str:
        return f"KL of {self.name}"


@dataclass(frozen=True)
class AnswerLoss(HeadTerm):
    """Negative log-likelihood of the tokens that follow the rows ``spans``: NLL_i = −Σ_rows log p(next token) of
    sequence i.

    ``weight × Σ_i NLL_i / denominator``, or with ``beta`` negative preference,
    ``weight × Σ_i −(2/β) log σ(β (NLL_i − NLL_ref,i)) / denominator``. Only the latter needs a reference.
    """

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    beta: float | None = None

    @property
    def compares_head(self) -> bool:
        return self.beta is not None

    @property
    def divides(self) -> bool:
        # Preference has a value without rows too.
        return bool(self.spans) if self.beta is not None else super().divides


@dataclass(frozen=True)
class SimplePreference(HeadTerm):
    """``weight × Σ_i −(2/β) log σ(β (NLL_i / |y_i| − δ)) / denominator``: negative preference per token, without a
    reference.
    """

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    beta: float
    delta: float

    @property
    def divides(self) -> bool:
        # It has a value without rows too.
        return bool(self.spans)


@dataclass(frozen=True)
class WeightedAscent(HeadTerm):
    """``weight × Σ_rows p^power (1 − p)^rest_power log p / denominator``, p the probability of the next token; its
    powers are constants to the gradient. Minimised, it makes those tokens unlikely.
    """

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    power: float
    rest_power: float


@dataclass(frozen=True)
class Unlikelihood(HeadTerm):
    """``weight × Σ_rows −log(1 − p) / denominator``, p the probability of the next token."""

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float


@dataclass(frozen=True)
class LoweredLabel(HeadTerm):
    """``weight × Σ_rows −Σ_v q_v log p_v / denominator``, q = softmax(z_ref − ``lowered``·1[next token]), a constant to
    the gradient; with ``own`` z_ref are the adapted model's logits, and no reference is run.
    """

    name: str
    spans: tuple[Span, ...]
    weight: float
    denominator: float
    lowered: float
    own: bool = False

    @property
    def compares_head(self) -> bool:
        return not self.own
