"""What Circuit Breakers and X-Boundary have in common: rows that are turned away from where the reference has them,
rows that are kept, and two coefficients that change places in the course of the training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Generic, Self, TypeVar

from pydantic import Field

from repbend_fast.data.records import Batch, Role, Sequence
from repbend_fast.objectives.adversarial import AttackedConfig, with_perturbed
from repbend_fast.objectives.base import Probes
from repbend_fast.objectives.choices import AnswerMode, Auto, DistanceUnit, PaddedLength, Quirks
from repbend_fast.objectives.refusal import refusal_streams
from repbend_fast.objectives.rows import all_rows, count, forget_sequences, mean_distance, padded_count
from repbend_fast.objectives.sections import RefusalConfig, at_share
from repbend_fast.objectives.states import check_states
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Distance
from repbend_fast.section import AboveZero, Positive


class ReroutingConfig(AttackedConfig, RefusalConfig):
    """What both have."""

    published_names: ClassVar[dict[str, str]] = {
        "alpha": "objective.coefficient",
        "loss_alpha": "objective.coefficient",
    }

    coefficient: AboveZero = Field(10.0, description="a of the two coefficients.")
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


C = TypeVar("C", bound=ReroutingConfig)


class Rerouting(ABC, Generic[C]):
    """A stream or more of what is bent, then ``retain`` and, where it has a weight, ``refusal``. ``steps`` is T unless
    ``schedule_steps`` is set.
    """

    def __init__(self, config: C, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> None:
        config = config.at_depth(num_blocks)
        assert not isinstance(config.layers, str)
        check_states("objective.layers", config.layers, num_blocks)
        self.config = config
        self.roles = config.roles
        self.num_blocks = num_blocks
        self.seed = seed
        self.uses_head = config.refusal > 0 or config.adversarial.weight > 0
        total = config.schedule_steps or steps
        if total is None:
            raise ValueError("the schedule needs the number of training steps")
        self.steps = total
        self.layers = tuple(sorted(set(config.layers)))
        self.last_state = max(config.layers)

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        share, a = self.kept_share(step), self.config.coefficient
        bent = self.bent(batch, a * (1 - share))
        kept = self._retain(self.kept(batch), a * share)
        streams = [*bent, kept, *refusal_streams(self.config, batch, step, self.seed)]
        return with_perturbed(self.config, streams, [s.name for s in bent], batch, self.num_blocks)

    def probes(self, batch: Batch) -> Probes:
        layers, unit = self.layers, self.config.distance_unit
        bent = mean_distance("forget", forget_sequences(batch), layers, unit)
        return Probes(bent, mean_distance("retain", batch.retain, layers, unit))

    @abstractmethod
    def kept_share(self, step: int) -> float:
        """The share of the coefficient that what is kept has at a step; what is bent has the rest."""

    @abstractmethod
    def bent(self, batch: Batch, weight: float) -> list[Stream]:
        """The streams of what is bent."""

    def kept(self, batch: Batch) -> tuple[Sequence, ...]:
        """The sequences that are kept."""
        return batch.retain

    def _retain(self, sequences: tuple[Sequence, ...], weight: float) -> Stream:
        spans = all_rows(sequences)
        rows = padded_count(sequences, self.config.padded_length) if self.config.published_quirks else count(spans)
        # The embedding's distance is zero and has no gradient; it is counted in the denominator and not read.
        layers = tuple(range(1, self.num_blocks + 1))
        term = Distance("retain", layers, spans, weight, rows * (self.num_blocks + 1), unit=self.config.distance_unit)
        return Stream("retain", sequences, (term,))
