"""Records that are there twice, or nearly so, and conversations that are to be kept and bent at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq

from repbend_fast.data.records import ROLES, Message, Record, Role

_Place = tuple[tuple[str, tuple[Message, ...]], Message]
"""A record's tools and context, and its answer."""


def duplicate_lines(records: Mapping[Role, Seq[Record]]) -> list[str]:
    """One line per role with exact duplicates, then one for conversations and one for prompts that stand on
    both sides.
    """
    lines = [line for role in ROLES for line in _twice(role, records.get(role, ()))]
    kept, bent = _sides(records)
    both = [place for place in kept if place in bent]
    if both:
        answers = "conversation is" if len(both) == 1 else "conversations are"
        lines.append(f"{len(both)} {answers} both safe and unsafe, {_pair(kept[both[0]], bent[both[0]])}")
    requests = {messages: record for (messages, _), record in reversed(bent.items())}
    # A pair says itself that its prompt has both; its unsafe answer may stand in an unsafe record too.
    contested = {
        messages: record
        for (messages, answer), record in kept.items()
        if messages in requests and (messages, answer) not in bent and record.role != "pair"
    }
    separate = {m: r for m, r in contested.items() if requests[m].origin != r.origin}
    if separate:
        first = next(iter(separate))
        prompts = "prompt has" if len(separate) == 1 else "prompts have"
        lines.append(
            f"{len(separate)} {prompts} a safe and an unsafe answer in separate records, "
            f"{_pair(separate[first], requests[first])}"
        )
    return lines


def _twice(role: Role, records: Seq[Record]) -> Iterator[str]:
    seen: dict[tuple[object, ...], Record] = {}
    again: list[tuple[Record, Record]] = []
    for record in records:
        first = seen.setdefault((record.tools, record.context, record.answers), record)
        if first is not record:
            again.append((first, record))
    if again:
        copies = "record is an exact copy" if len(again) == 1 else "records are exact copies"
        yield f"{len(again)} {role} {copies} of an earlier one, {_pair(*again[0])}"


def _pair(first: Record, second: Record) -> str:
    return (
        f"{second.origin} of {first.origin} for one"
        if first.role == second.role
        else f"{first.origin} and {second.origin} for one"
    )


def _sides(records: Mapping[Role, Seq[Record]]) -> tuple[dict[_Place, Record], dict[_Place, Record]]:
    """The first record of each conversation that is to be kept, and of each that is to be bent, by context and
    answer.
    """
    kept: dict[_Place, Record] = {}
    bent: dict[_Place, Record] = {}
    for record in (*records.get("safe", ()), *records.get("pair", ()), *records.get("retain", ())):
        kept.setdefault(((record.tools, record.context), record.answers[-1]), record)
    for record in (*records.get("unsafe", ()), *records.get("pair", ())):
        bent.setdefault(((record.tools, record.context), record.answers[0]), record)
    return kept, bent


class NearDuplicates:
    """Texts so far, and which of them a new one is nearly the same as.

    Two texts are near where they share at least ``likeness`` of their runs of ``size`` words (Jaccard index); case and
    punctuation do not count. A text shorter than ``size`` words is one run.
    """

    def __init__(self, likeness: float, size: int) -> None:
        self.likeness, self.size = likeness, size
        self._sizes: list[int] = []
        self._holders: dict[tuple[str, ...], list[int]] = {}

    def near(self, text: str) -> Iterator[int]:
        """The numbers of earlier texts that ``text`` is near to, in their order."""
        runs = self._runs(text)
        shared = Counter(number for run in runs for number in self._holders.get(run, ()))
        for number in sorted(shared):
            if shared[number] >= self.likeness * (len(runs) + self._sizes[number] - shared[number]):
                yield number

    def add(self, text: str) -> None:
        """Remember ``text`` under the next number, from 0 on."""
        runs = self._runs(text)
        for run in runs:
            self._holders.setdefault(run, []).append(len(self._sizes))
        self._sizes.append(len(runs))

    def _runs(self, text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.casefold())
        return {tuple(words[i : i + self.size]) for i in range(max(1, len(words) - self.size + 1))}
