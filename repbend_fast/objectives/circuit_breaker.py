"""Circuit Breakers, representation rerouting (Zou et al., NeurIPS 2024, arXiv 2406.04313).

    L = c_r·mean ‖h − r‖₂ + c_f·mean relu(cos(h, r)),    c_r = a·t/(2T),  c_f = a·(1 − t/(2T)),  t = 1 … T

The first mean runs over the rows of the retain stream and all hidden states, the second over the rows of the forget stream
(prompt and answer, or the answer alone with ``loss_mode: response_all``) and ``layers``. ``objectives.refusal`` may be added.
"""

from __future__ import annotations

from repbend_fast.data.records import Batch, Role
from repbend_fast.objectives.base import Distance, Stream, all_rows, count, forget_sequences, l2_probe, mode_rows, padded_count
from repbend_fast.objectives.refusal import refusal_streams
from repbend_fast.objectives.sections import CircuitBreakerConfig
from repbend_fast.objectives.states import check_states


class CircuitBreaker:
    """Streams ``forget`` and ``retain``. ``steps`` is T unless ``schedule_steps`` is set."""

    roles: tuple[Role, ...] = ("unsafe", "pair", "retain")

    def __init__(self, config: CircuitBreakerConfig, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> None:
        config = config.at_depth(num_blocks)
        assert not isinstance(config.layers, str)
        check_states("objective.layers", config.layers, num_blocks)
        self.config = config
        self.num_blocks = num_blocks
        self.seed = seed
        self.uses_head = config.refusal > 0
        total = config.schedule_steps or steps
        if total is None:
            raise ValueError("the schedule needs the number of training steps")
        self.steps = total
        self.layers = tuple(sorted(set(config.layers)))
        self.last_state = max(config.layers)

    @classmethod
    def required_roles(cls, config: CircuitBreakerConfig) -> tuple[Role, ...]:
        """The roles whose records the terms read."""
        return cls.roles

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        progress = min((step + 1) / (2 * self.steps), 1.0)
        forget, retain = self.config.coefficient * (1 - progress), self.config.coefficient * progress
        return [self._forget(batch, forget), self._retain(batch, retain), *refusal_streams(self.config, batch, step, self.seed)]

    def probes(self, batch: Batch) -> list[Stream]:
        sequences = forget_sequences(batch)
        unit = self.config.distance_unit
        return [*l2_probe("forget", sequences, self.layers, unit), *l2_probe("retain", batch.retain, self.layers, unit)]

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
