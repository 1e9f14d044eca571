"""Circuit Breakers, representation rerouting (Zou et al., NeurIPS 2024, arXiv 2406.04313).

    L = c_r·mean ‖h − r‖₂ + c_f·mean relu(cos(h, r)),    c_r = a·t/(2T),  c_f = a·(1 − t/(2T)),  t = 1 … T

The first mean runs over the rows of the retain stream and all hidden states, the second over the rows of the forget
stream (prompt and answer, or the answer alone with ``loss_mode: response_all``) and ``layers``. ``objectives.refusal``
may be added.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from repbend_fast.data.records import Batch
from repbend_fast.objectives.adversarial import with_copies
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rerouting import Rerouting, ReroutingConfig
from repbend_fast.objectives.rows import count, forget_sequences, mode_rows
from repbend_fast.objectives.sections import TITLES, Entry
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Distance
from repbend_fast.section import AboveZero


class CircuitBreakerConfig(ReroutingConfig):
    """Circuit Breakers (representation rerouting): L = c_r·mean ‖h − r‖ on retain + c_f·mean relu(cos(h,
    r)) on forget.
    """

    place: ClassVar[int] = 2
    stream_names: ClassVar[tuple[str, ...]] = with_copies("forget", "retain", "refusal", of=("forget",))
    titles: ClassVar[dict[str, str]] = {
        "reroute": "reroute: cosine to the reference",
        "retain": "retain: kept at the reference",
        "refusal": TITLES["refusal"],
    }

    name: Literal["circuit_breaker"] = "circuit_breaker"
    coefficient: AboveZero = Field(
        10.0, description="a of c_r = a·t/(2T) and c_f = a·(1 − t/(2T)); published: 10 Llama-3, 5 Mistral."
    )

    @classmethod
    def recorded(cls, case: Entry, expected: Entry) -> CircuitBreakerConfig:
        """See :class:`MethodConfig`."""
        # The recorded batches have equal lengths and no padding, so the published mean over padding is over real
        # tokens.
        layers = case["target_hidden_states"]
        return cls(coefficient=float(case["alpha"]), layers=layers, published_quirks=True, padded_length=None)


@method(CircuitBreakerConfig)
class CircuitBreaker(Rerouting[CircuitBreakerConfig]):
    """Streams ``forget`` and ``retain``."""

    def kept_share(self, step: int) -> float:
        return min((step + 1) / (2 * self.steps), 1.0)

    def bent(self, batch: Batch, weight: float) -> list[Stream]:
        sequences = forget_sequences(batch)
        spans = mode_rows(sequences, self.config.loss_mode)
        term = Distance("reroute", self.layers, spans, weight, count(spans) * len(self.layers), kind="relu_cosine")
        return [Stream("forget", sequences, (term,))]
