"""What RepBend and CRL have in common: a window of hidden states in which unsafe rows are bent, safe rows that stay,
and ordinary conversations that the KL keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Generic, TypeVar

from repbend_fast.data.records import Batch, Role
from repbend_fast.objectives.adversarial import AttackedConfig, with_perturbed
from repbend_fast.objectives.base import Probes
from repbend_fast.objectives.refusal import refusal_streams
from repbend_fast.objectives.rows import kl_stream
from repbend_fast.objectives.sections import RefusalConfig, WindowConfig
from repbend_fast.objectives.streams import Stream


class WindowedConfig(AttackedConfig, RefusalConfig, WindowConfig):
    """What both have. ``moving`` are the two weights one of which LoRA needs to leave its start, B = 0."""

    moving: ClassVar[tuple[str, str]]

    def with_kept(self, roles: tuple[Role, ...]) -> tuple[Role, ...]:
        """``roles``, each once, and those that the KL and the refusal read."""
        return self.with_pairs((*roles, "retain") if self.kl_weight else roles)

    def errors(self) -> Iterator[str]:
        yield from super().errors()
        first, second = self.moving
        if not (getattr(self, first) or getattr(self, second) or self.refusal):
            yield (
                f"objective.{first}=0 with objective.{second}=0: the other terms have no gradient while LoRA is at its "
                "start, so nothing would ever train; give one of the two, or objective.refusal, a weight above 0"
            )


C = TypeVar("C", bound=WindowedConfig)


class Windowed(ABC, Generic[C]):
    """Streams of what stays and of what is bent, then ``retain`` and ``refusal``; those without a weight are left out.
    A model with ``num_blocks`` decoder blocks has hidden states 0 … num_blocks.
    """

    def __init__(self, config: C, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> None:
        del steps  # the weights are constant
        self.config = config = config.within(num_blocks)
        self.num_blocks = num_blocks
        self.roles = config.roles
        self.seed = seed
        self.uses_head = config.kl_weight > 0 or config.refusal > 0 or config.adversarial.weight > 0
        self.last_state = max(config.window)

    @property
    def staying_layers(self) -> tuple[int, ...]:
        """The hidden states at which safe rows stay: all, the embedding's output among them, or the window."""
        return tuple(range(self.num_blocks + 1)) if self.config.alpha_mode == "all" else self.config.window

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        config, bent = self.config, self.bent(batch)
        kept = [kl_stream(config, batch.retain)] if config.kl_weight else []
        streams = [*self.staying(batch), *bent, *kept, *refusal_streams(config, batch, step, self.seed)]
        return with_perturbed(config, streams, [s.name for s in bent], batch, self.num_blocks)

    @abstractmethod
    def probes(self, batch: Batch) -> Probes: ...

    def staying(self, batch: Batch) -> list[Stream]:
        """The stream of what stays, where it has one of its own."""
        return []

    @abstractmethod
    def bent(self, batch: Batch) -> list[Stream]:
        """The stream of what is bent, where it has a weight."""
