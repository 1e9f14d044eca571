"""What the methods have in common that forget answers by their likelihood: a stream ``forget`` with one term, and
``retain`` where something is to be kept.

    L = (the method's own) + retain_nll·NLL/tokens + retain_kl·K,    K = T²·KL(softmax(z_ref/T) ‖ softmax(z/T))

over the answer tokens of the retain conversations; either, both or none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from repbend_fast.data.records import Batch, Sequence
from repbend_fast.objectives.base import Probes
from repbend_fast.objectives.rows import forget_sequences, mean_distance, predicting_rows, retain_kl, retain_nll
from repbend_fast.objectives.sections import ForgettingConfig
from repbend_fast.objectives.streams import Stream
from repbend_fast.objectives.terms import Span, Term

C = TypeVar("C", bound=ForgettingConfig)


class Forgetting(ABC, Generic[C]):
    """Every pass ends at the head. The weights are constant, and nothing is drawn."""

    uses_head = True

    def __init__(self, config: C, num_blocks: int, steps: int | None = None, seed: int | None = 0) -> None:
        del steps, seed
        self.config = config
        self.last_state = num_blocks
        self.roles = config.roles

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        del step
        sequences = forget_sequences(batch)
        streams = [Stream("forget", sequences, (self.forget(sequences),))]
        if "retain" in self.roles:
            streams.append(Stream("retain", batch.retain, self.retain(batch.retain)))
        return streams

    def probes(self, batch: Batch) -> Probes:
        layers = (self.last_state,)
        bent = mean_distance("forget", forget_sequences(batch), layers)
        return Probes(bent, mean_distance("retain", batch.retain, layers))

    @abstractmethod
    def forget(self, sequences: tuple[Sequence, ...]) -> Term:
        """The term over the answers of ``sequences``."""

    def retain(self, sequences: tuple[Sequence, ...]) -> tuple[Term, ...]:
        """The terms over what is to stay: K and its NLL per token, weighted by ``retain_kl`` and ``retain_nll``."""
        config = self.config
        kl = (retain_kl(self.compared(sequences), config.retain_kl, config.temperature),) if config.retain_kl else ()
        return (*kl, *((retain_nll(sequences, config.retain_nll),) if config.retain_nll else ()))

    def compared(self, sequences: tuple[Sequence, ...]) -> tuple[Span, ...]:
        """The rows of retain conversations that K compares: those that predict the answers' tokens."""
        return predicting_rows(sequences)
