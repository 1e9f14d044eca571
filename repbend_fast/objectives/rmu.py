"""RMU, representation misdirection for unlearning (Li et al., ICML 2024, arXiv 2403.03218).

    L = MSE(h_ℓ(forget), c·u) + a·MSE(h_ℓ(retain), r_ℓ(retain))

u is a fixed unit vector drawn from U[0, 1)^D. Both means run over all rows (of forget with ``loss_mode: response_all``
the answers') and the width; no pass goes beyond hidden state ℓ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field

from repbend_fast.data.records import Batch, Role, Sequence
from repbend_fast.objectives.base import Probes
from repbend_fast.objectives.choices import AnswerMode, Auto, DistanceUnit, PaddedLength, Quirks
from repbend_fast.objectives.registry import method
from repbend_fast.objectives.rows import all_rows, count, forget_sequences, mean_distance, mode_rows, padded_count
from repbend_fast.objectives.sections import Aim, MethodConfig, at_share
from repbend_fast.objectives.states import check_states
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Direction, Distance, Span
from repbend_fast.section import AboveZero, NonNegative, Positive, Weight


class RMUConfig(MethodConfig):
    """RMU: L = MSE(h(forget), c·u) + retain·MSE(h(retain), r(retain)) at one hidden state."""

    place: ClassVar[int] = 3
    aim: ClassVar[Aim] = "unlearning"
    stream_names: ClassVar[tuple[str, ...]] = ("forget", "retain")
    titles: ClassVar[dict[str, str]] = {"forget": "forget", "retain": "retain: kept at the reference"}
    published_names: ClassVar[dict[str, str]] = {
        "alpha": "objective.retain",
        "loss_alpha": "objective.retain",
        "steering_coeff": "objective.coefficient",
    }

    name: Literal["rmu"] = "rmu"
    layer: Positive | Auto = Field(
        8, description="Hidden state that is steered: 8 is the output of block 7; auto = as deep as 8 of 32."
    )
    distance_unit: DistanceUnit = "state"
    coefficient: AboveZero = Field(6.5, description="c, the length of the fixed random direction, in distance_unit.")
    retain: Weight = Field(1200.0, description="Weight of the retain states' squared error.")
    direction_seed: NonNegative = Field(42, description="Seed of the fixed random direction u.")
    loss_mode: AnswerMode = Field("prompt_response", description="Which tokens' states count.")
    published_quirks: Quirks = False
    padded_length: PaddedLength = None

    @property
    def last_state(self) -> int | None:
        return None if isinstance(self.layer, str) else self.layer

    def at_depth(self, num_blocks: int) -> Self:
        return self.model_copy(update={"layer": at_share(8, num_blocks) if self.layer == "auto" else self.layer})

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("unsafe", "pair", "retain") if self.retain else ("unsafe", "pair")

    @classmethod
    def wanted_lora(cls, written: dict[str, object]) -> dict[str, object]:
        """The published choice of what is trained: one matrix of the last three blocks before the layer."""
        layer = written.get("layer", cls().layer)
        if layer != "auto" and not (type(layer) is int and layer > 0):
            return {}
        blocks = "last_three" if isinstance(layer, str) else list(range(max(0, layer - 3), layer))
        return {"target_modules": ["down_proj"], "blocks": blocks}


@method(RMUConfig)
class RMU:
    """Streams ``forget`` (which needs no reference) and ``retain``."""

    uses_head = False

    def __init__(self, config: RMUConfig, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> None:
        del steps, seed  # the weights are constant, and nothing is drawn
        config = config.at_depth(num_blocks)
        assert not isinstance(config.layer, str)
        check_states("objective.layer", [config.layer], num_blocks)
        self.config = config
        self.last_state = config.layer
        self.roles = config.roles

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        del step
        config, sequences = self.config, forget_sequences(batch)
        rows, target = mode_rows(sequences, config.loss_mode), Direction(config.direction_seed, config.coefficient)
        forget = replace(self._mse("forget", sequences, rows, 1.0), target=target)
        retain = self._mse("retain", batch.retain, all_rows(batch.retain), config.retain)
        streams = [Stream("forget", sequences, (forget,)), Stream("retain", batch.retain, (retain,))]
        return streams if config.retain else streams[:1]

    def probes(self, batch: Batch) -> Probes:
        layers, unit = (self.last_state,), self.config.distance_unit
        bent = mean_distance("forget", forget_sequences(batch), layers, unit)
        return Probes(bent, mean_distance("retain", batch.retain, layers, unit))

    def _mse(self, name: str, sequences: tuple[Sequence, ...], spans: tuple[Span, ...], weight: float) -> Distance:
        """The mean over ``spans`` and the width of the squared error against the reference."""
        config = self.config
        rows = padded_count(sequences, config.padded_length) if config.published_quirks else count(spans)
        return Distance(name, (self.last_state,), spans, weight, rows, kind="mse", unit=config.distance_unit)
