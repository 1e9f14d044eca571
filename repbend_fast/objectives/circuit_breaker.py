"""Circuit Breakers, representation rerouting (Zou et al., NeurIPS 2024, arXiv 2406.04313).

    L = c_r·mean ‖h − r‖₂ + c_f·mean relu(cos(h, r)),    c_r = a·t/(2T),  c_f = a·(1 − t/(2T)),  t = 1 … T

The first mean runs over the rows of the retain stream and all hidden states, the second over the rows of the forget
stream (prompt and answer, or the answer alone with ``loss_mode: response_all``) and ``layers``. ``objectives.refusal``
may be added.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from repbend_fast.data.records import Batch, Role
from repbend_fast.objectives.base import Probes
from repbend_fast.objectives.refusal import refusal_streams
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import all_rows, count, forget_sequences, mean_distance, mode_rows, padded_count
from repbend_fast.objectives.sections import (
    TITLES,
    AnswerMode,
    Auto,
    DistanceUnit,
    Entry,
    PaddedLength,
    Quirks,
    RefusalConfig,
    at_share,
)
from repbend_fast.objectives.states import check_states
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Distance
from repbend_fast.section import AboveZero, Positive


class CircuitBreakerConfig(RefusalConfig):
    """Circuit Breakers (representation rerouting): L = c_r·mean ‖h − r‖ on retain + c_f·mean relu(cos(h,
    r)) on forget.
    """

    place: ClassVar[int] = 2
    stream_names: ClassVar[tuple[str, ...]] = ("forget", "retain", "refusal")
    titles: ClassVar[dict[str, str]] = {
        "reroute": "reroute: cosine to the reference",
        "retain": "retain: kept at the reference",
        "refusal": TITLES["refusal"],
    }
    published_names: ClassVar[dict[str, str]] = {
        "alpha": "objective.coefficient",
        "loss_alpha": "objective.coefficient",
    }

    name: Literal["circuit_breaker"] = "circuit_breaker"
    coefficient: AboveZero = Field(
        10.0, description="a of c_r = a·t/(2T) and c_f = a·(1 − t/(2T)); published: 10 Llama-3, 5 Mistral."
    )
    layers: Annotated[list[Positive], Field(min_length=1)] | Auto = Field(
        [10, 20],
        description="Hidden states that forget rows are rerouted at; auto = as deep as 10 and 20 of 32 blocks.",
    )
    distance_unit: DistanceUnit = "state"
    schedule_steps: Positive | None = Field(None, description="T of the schedule; none = training.steps.")
    loss_mode: AnswerMode = Field("prompt_response", description="Which tokens' states count.")
    published_quirks: Quirks = False
    padded_length: PaddedLength = 1024

    @property
    def last_state(self) -> int | None:
        return None if isinstance(self.layers, str) else max(self.layers)

    def at_depth(self, num_blocks: int) -> Self:
        layers = sorted({at_share(10, num_blocks), at_share(20, num_blocks)}) if self.layers == "auto" else self.layers
        return self.model_copy(update={"layers": layers})

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("unsafe", "pair", "retain")

    @classmethod
    def recorded(cls, case: Entry, expected: Entry) -> CircuitBreakerConfig:
        """See :class:`MethodConfig`."""
        # The recorded batches have equal lengths and no padding, so the published mean over padding is over real
        # tokens.
        layers = case["target_hidden_states"]
        return cls(coefficient=float(case["alpha"]), layers=layers, published_quirks=True, padded_length=None)


@method(CircuitBreakerConfig)
class CircuitBreaker:
    """Streams ``forget`` and ``retain``. ``steps`` is T unless ``schedule_steps`` is set."""

    def __init__(
        self, config: CircuitBreakerConfig, num_blocks: int, steps: int | None = None, seed: int | None = 0
    ) -> None:
        config = config.at_depth(num_blocks)
        assert not isinstance(config.layers, str)
        check_states("objective.layers", config.layers, num_blocks)
        self.config = config
        self.roles = config.roles
        self.num_blocks = num_blocks
        self.seed = seed
        self.uses_head = config.refusal > 0
        total = config.schedule_steps or steps
        if total is None:
            raise ValueError("the schedule needs the number of training steps")
        self.steps = total
        self.layers = tuple(sorted(set(config.layers)))
        self.last_state = max(config.layers)

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        progress = min((step + 1) / (2 * self.steps), 1.0)
        forget, retain = self.config.coefficient * (1 - progress), self.config.coefficient * progress
        return [
            self._forget(batch, forget),
            self._retain(batch, retain),
            *refusal_streams(self.config, batch, step, self.seed),
        ]

    def probes(self, batch: Batch) -> Probes:
        layers, unit = self.layers, self.config.distance_unit
        bent = mean_distance("forget", forget_sequences(batch), layers, unit)
        return Probes(bent, mean_distance("retain", batch.retain, layers, unit))

    def _forget(self, batch: Batch, weight: float) -> Stream:
        sequences = forget_sequences(batch)
        spans = mode_rows(sequences, self.config.loss_mode)
        term = Distance("reroute", self.layers, spans, weight, count(spans) * len(self.layers), kind="relu_cosine")
        return Stream("forget", sequences, (term,))

    def _retain(self, batch: Batch, weight: float) -> Stream:
        spans = all_rows(batch.retain)
        rows = padded_count(batch.retain, self.config.padded_length) if self.config.published_quirks else count(spans)
        # The embedding's distance is zero and has no gradient; it is counted in the denominator and not read.
        layers = tuple(range(1, self.num_blocks + 1))
        term = Distance("retain", layers, spans, weight, rows * (self.num_blocks + 1), unit=self.config.distance_unit)
        return Stream("retain", batch.retain, (term,))
