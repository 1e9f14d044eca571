"""What an attack is that changes the model: it gives models to be asked the same prompts again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from repbend_fast.data.prompts import Prompt
from repbend_fast.evaluation.attacks.protocol import Target


@runtime_checkable
class ModelChange(Protocol):
    """``name`` is what ``--attack`` takes, without its settings. Deterministic under ``seed``.

    ``folder``: where it keeps what it has finished, so that an interrupted run does not begin anew; set by whoever runs
    it, before ``variants``. None keeps nothing.
    """

    name: ClassVar[str]
    folder: Path | None

    def variants(self, target: Target, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[tuple[str, Target]]:
        """Label and changed model, one after the other.

        A variant holds until the generator goes on or is closed; it shares its weights with ``target``, which is as it
        was, to the bit, once the generator has ended. ``encoder`` may be another than ``target``'s: the variant is to
        be asked through it.
        """
        ...

    def summary(self) -> dict[str, object]:
        """What was measured on the way, in plain values for JSON; complete once ``variants`` has ended."""
        ...
