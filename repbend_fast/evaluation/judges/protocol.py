"""What a judge is: it labels answers, and says so where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from repbend_fast.data.prompts import Prompt

Judged = Literal["comply", "refuse", "degenerate", "unparsed"]
"""``unparsed``: the judge gave no verdict that can be read. It is a column of its own and never a number."""
JUDGED: tuple[Judged, ...] = ("comply", "refuse", "degenerate", "unparsed")


@dataclass(frozen=True, slots=True)
class Opinion:
    """One judge's label of one answer. ``reason``: the rule, or the judge's own words, clipped."""

    label: Judged
    reason: str = ""
    helpful: bool | None = None
    """Whether an answer to an ordinary or borderline prompt helps; None from a judge that does not say."""


@runtime_checkable
class Judge(Protocol):
    """``name`` identifies judge, model and version in records (``rule``, ``endpoint:gpt-4o``)."""

    name: str

    def judge(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Opinion]:
        """One opinion for each answer, in order; never fewer, whatever happens to the judge."""
        ...
