"""What an objective is to the rest of the program: it turns a batch into streams. How they are computed is ``step``'s
business.

The total loss is a sum over streams, so each stream is run and differentiated on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from repbend_fast.data.records import Batch, Role
from repbend_fast.objectives.streams import Stream


@dataclass(frozen=True)
class Probes:
    """Streams of one term, a distance, whose means the guard reports: what is to be bent, and what is to be kept; None
    = not measured.
    """

    bent: Stream | None = None
    kept: Stream | None = None

    def __iter__(self) -> Iterator[Stream]:
        """Those that are there, what is bent first."""
        return (stream for stream in (self.bent, self.kept) if stream is not None)


class Objective(Protocol):
    """An objective turns a batch into streams. ``step`` counts from 0, for scheduled weights.

    ``roles``: the records that a batch must hold. ``uses_head``: whether a term reads logits. ``last_state``: the last
    hidden state that the adapter has to reach.
    """

    roles: tuple[Role, ...]
    uses_head: bool
    last_state: int

    def streams(self, batch: Batch, step: int) -> list[Stream]: ...

    def probes(self, batch: Batch) -> Probes: ...


def earlier_probes(names: list[str]) -> tuple[str | None, str | None]:
    """What a row that does not say it has bent and kept: known names by what they are, an objective's own by their
    order.
    """
    known = [
        next((name for name in names if name in side), None) for side in (("unsafe", "forget"), ("safe", "retain"))
    ]
    if known == [None, None]:
        return names[0] if names else None, names[1] if len(names) > 1 else None
    return known[0], known[1]
