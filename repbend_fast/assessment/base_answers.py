"""The base's answers of another evaluation: several adapters of one model need it asked once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from repbend_fast.assessment.answers import ANSWER_FIELDS, RowFile, key_of
from repbend_fast.assessment.conditions import SETTINGS, go_on, read_settings
from repbend_fast.assessment.json_rows import AnswerRow, Change
from repbend_fast.assessment.session import CHANGES, read_changes
from repbend_fast.console import say
from repbend_fast.errors import UserError
from repbend_fast.runs.folder import write_json

BASE = "base"
OF_THE_BENT_SIDE = ("target", "adapter", "adapter_sha256")
"""Settings that the base's answers do not depend on."""
ANOTHER = "another --base-of"


@dataclass(frozen=True)
class BaseAnswers:
    """What the base has answered elsewhere, and the models that attacks have made of it there, by name."""

    source: Path
    rows: list[AnswerRow]
    changes: dict[str, Change]
    tokenizer: object | None

    def give(self, folder: Path) -> None:
        """Put it into an evaluation's folder that has begun; what is answered there stays."""
        own = RowFile(folder / "answers.jsonl")
        there = {key_of(row) for row in cast(list[AnswerRow], own.read(ANSWER_FIELDS)) if row["answers"]}
        taken = [row for row in self.rows if key_of(row) not in there]
        for row in taken:
            own.append(row)
        if self.changes:
            write_json(folder / CHANGES, self.changes | read_changes(folder / CHANGES))
        if self.tokenizer is not None:  # held against the model's own when that is loaded
            go_on(folder / SETTINGS, {"tokenizer": self.tokenizer})
        count = "1 answer" if len(taken) == 1 else f"{len(taken)} answers"
        say(f"{folder}: {count} of the base from {self.source}")


def find_base(other: Path, folder: Path, settings: dict[str, object]) -> BaseAnswers:
    """The base's answers in the evaluation ``other`` to the prompts of the one with these ``settings``, which will be
    in ``folder``. Writes nothing.

    Raises:
        UserError: ``other`` is no evaluation, is ``folder``, has no answers of a base, or asked it in another way. It
            names the setting and both values.
    """
    if other.resolve() == folder.resolve():
        raise UserError(f"{other}: is the folder of this evaluation itself; give {ANOTHER}, or none")
    if not (other / SETTINGS).is_file():
        inside = next((f", such as {path.parent}" for path in sorted(other.glob(f"*/{SETTINGS}"))), "")
        raise UserError(f"{other}: no evaluation; name the folder that `repbend-fast eval` wrote{inside}")
    wanted = {key: value for key, value in settings.items() if key not in OF_THE_BENT_SIDE}
    theirs = read_settings(other / SETTINGS, wanted | _tokenizer_of(folder), ANOTHER)
    absent = [key for key in ("model", "seed", "suites") if key not in theirs]
    if absent:
        raise UserError(f"{other / SETTINGS}: says nothing of {absent[0]}; give {ANOTHER}")
    suites = set(cast(dict[str, object], theirs["suites"])) & set(cast(dict[str, object], settings["suites"]))
    file = RowFile(other / "answers.jsonl", remedy=ANOTHER)
    found = cast(list[AnswerRow], file.read(ANSWER_FIELDS, mend=False))
    rows = [row for row in found if _is_base(row, suites) and row["answers"]]
    if not rows:
        raise UserError(f"{other}: holds no answers of a base to these prompts; give {ANOTHER}, or none")
    changes = read_changes(other / CHANGES, f"give {ANOTHER}")
    changes = {name: change for name, change in changes.items() if _is_base(change, suites)}
    return BaseAnswers(other, rows, changes, theirs.get("tokenizer"))


def _is_base(row: AnswerRow | Change, suites: set[str]) -> bool:
    return row["side"] == BASE and row["suite"] in suites


def _tokenizer_of(folder: Path) -> dict[str, object]:
    """What the folder's own answers were given with, if there are any."""
    try:
        stored = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return {"tokenizer": stored["tokenizer"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # none yet, or something that going on with the folder will refuse
