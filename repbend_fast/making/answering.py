"""The model's answers to tasks, asked in waves until enough of each kind have come out well; every answer is a row on
the disk as it comes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from repbend_fast.assessment.answers import RowFile
from repbend_fast.console import CountLine
from repbend_fast.data.duplicates import NearDuplicates
from repbend_fast.data.prompts import Prompt
from repbend_fast.evaluation.generate import Answer
from repbend_fast.making.screening import masked, problem
from repbend_fast.making.tasks import Group, Task

Generator = Callable[[Sequence[Prompt], Sequence[str]], list[Answer]]
"""Answers to prompts, each made to begin as the second argument says; without that beginning, as ``generate_measured``
gives them.
"""
ROW_FIELDS = ("key", "attempt", "text", "stopped")
ALIKE = 0.8
"""Share of common runs of three words from which two answers count as one."""

Attempt = tuple[Task, int]


@dataclass(frozen=True)
class Written:
    """An answer of the model to a task, begun with ``start``. ``stopped``: it ended by itself."""

    task: Task
    attempt: int
    start: str
    text: str
    stopped: bool


@dataclass(frozen=True)
class Rejected:
    """An answer that is of no use, and why."""

    written: Written
    reason: str


class Answers:
    """Rows of a file by task and attempt, and the model for those that are missing.

    Blocks of ``batch_size`` are asked together and are the same ones after a kill, so that rounding is too.
    """

    def __init__(self, file: RowFile, generate: Generator, batch_size: int, progress: CountLine) -> None:
        self.file, self.generate, self.batch_size, self.progress = file, generate, batch_size, progress
        self._rows = {(str(row["key"]), cast(int, row["attempt"])): row for row in file.read(ROW_FIELDS)}

    def known(self) -> int:
        """How many answers there are."""
        return len(self._rows)

    def of(self, attempts: Sequence[Attempt]) -> list[Written]:
        """The answers to ``attempts``, in their order; those that are missing are asked for now."""
        by_length = sorted(
            attempts, key=lambda one: (one[0].part, len(one[0].prompt.text) + len(one[0].starts[one[1]]))
        )
        for first in range(0, len(by_length), self.batch_size):
            self._ask(by_length[first : first + self.batch_size])
        return [self._written(task, attempt) for task, attempt in attempts]

    def _ask(self, block: Sequence[Attempt]) -> None:
        missing = [one for one in block if (one[0].key, one[1]) not in self._rows]
        if missing:
            prompts = [task.prompt for task, _ in block]
            answers = self.generate(prompts, [task.starts[attempt] for task, attempt in block])
            for (task, attempt), answer in zip(block, answers, strict=True):
                if (task.key, attempt) in self._rows:
                    continue
                row: dict[str, object] = {"key": task.key, "attempt": attempt, "request": task.prompt.text}
                row |= {"start": task.starts[attempt], "text": answer.text, "stopped": answer.stopped}
                self.file.append(row)
                self._rows[task.key, attempt] = row
        self.progress.expect(len(missing) - len(block))
        for part, count in Counter(f"{task.split} {task.part}" for task, _ in missing).items():
            self.progress.advance(part, count)

    def _written(self, task: Task, attempt: int) -> Written:
        row = self._rows[task.key, attempt]
        return Written(task, attempt, task.starts[attempt], str(row["text"]), bool(row["stopped"]))


def answer(answers: Answers, group: Group) -> tuple[list[Written], list[Rejected]]:
    """Good answers to ``group.wanted`` of its tasks, if there are as many, in the order of the tasks; and those that
    were rejected on the way.

    A task whose answer is rejected is asked again with its next beginning. When those are used up, one of the spare
    tasks takes its place.
    """
    good: dict[str, Written] = {}
    rejected: list[Rejected] = []
    tried = dict.fromkeys((task.key for task in group.tasks), 0)
    alike = NearDuplicates(ALIKE, 3)
    names: list[str] = []
    while True:
        left = [task for task in group.tasks if task.key not in good and tried[task.key] < len(task.starts)]
        # Those that were begun come first: another beginning is another wording of the same, which keeps items even.
        left.sort(key=lambda task: tried[task.key] == 0)
        wave = [(task, tried[task.key]) for task in left[: group.wanted - len(good)]]
        if not wave:
            break
        answers.progress.expect(len(wave) if any(tried.values()) else 0)
        for written in answers.of(wave):
            tried[written.task.key] += 1
            text = masked(written)
            reason = problem(written) or next((f"nearly the same as {names[i]}" for i in alike.near(text)), "")
            if reason:
                rejected.append(Rejected(written, reason))
                continue
            alike.add(text)
            names.append(written.task.key)
            good[written.task.key] = written
    order = [task.key for task in group.tasks if task.key in good]
    return [good[key] for key in order], rejected
