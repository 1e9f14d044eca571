"""RMU, representation misdirection for unlearning (Li et al., ICML 2024, arXiv 2403.03218).

    L = MSE(h_ℓ(forget), c·u) + a·MSE(h_ℓ(retain), r_ℓ(retain))

u is a fixed unit vector drawn from U[0, 1)^D. Both means run over all rows (of forget with ``loss_mode: response_all`` the answers')
and the width; no pass goes beyond hidden state ℓ.
"""

from __future__ import annotations

from repbend_fast.data.records import Batch, Role, Sequence
from repbend_fast.objectives.base import (
    Direction,
    Distance,
    Span,
    Stream,
    all_rows,
    count,
    forget_sequences,
    l2_probe,
    mode_rows,
    padded_count,
)
from repbend_fast.objectives.sections import RMUConfig
from repbend_fast.objectives.states import check_states


class RMU:
    """Streams ``forget`` (which needs no reference) and ``retain``."""

    uses_head = False

    def __init__(self, config: RMUConfig, num_blocks: int, steps: int | None = None) -> None:
        del steps  # the weights are constant
        config = config.at_depth(num_blocks)
        assert not isinstance(config.layer, str)
        check_states("objective.layer", [config.layer], num_blocks)
        self.config = config
        self.last_state = config.layer
        self.roles = self.required_roles(config)

    @staticmethod
    def required_roles(config: RMUConfig) -> tuple[Role, ...]:
        """The roles whose records the terms with a weight read."""
        return ("unsafe", "pair", "retain") if config.retain else ("unsafe", "pair")

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        del step
        target = Direction(self.config.direction_seed, self.config.coefficient)
        forget = forget_sequences(batch)
        streams = [self._stream("forget", forget, mode_rows(forget, self.config.loss_mode), 1.0, target)]
        if self.config.retain:
            streams.append(self._stream("retain", batch.retain, all_rows(batch.retain), self.config.retain, None))
        return streams

    def probes(self, batch: Batch) -> list[Stream]:
        layers, unit = (self.last_state,), self.config.distance_unit
        return [*l2_probe("forget", forget_sequences(batch), layers, unit), *l2_probe("retain", batch.retain, layers, unit)]

    def _stream(
        self, name: str, sequences: tuple[Sequence, ...], spans: tuple[Span, ...], weight: float, target: Direction | None
    ) -> Stream:
        rows = padded_count(sequences, self.config.padded_length) if self.config.published_quirks else count(spans)
        term = Distance(name, (self.last_state,), spans, weight, rows, kind="mse", target=target, unit=self.config.distance_unit)
        return Stream(name, sequences, (term,))
