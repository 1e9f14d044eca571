"""The base's answers of another evaluation: several adapters of one model need it asked once."""

from __future__ import annotations

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


def take_base(folder: Path, settings: dict[str, object], other: Path) -> None:
    """Copy what the base has answered in the evaluation ``other`` into ``folder``, whose own settings these are; what
    is there already stays.

    Raises:
        UserError: ``other`` is no evaluation, has no answers of a base, or asked it in another way. It names the
            setting and both values.
    """
    if not (other / SETTINGS).is_file():
        raise UserError(f"{other}: no evaluation to take the base's answers from ({SETTINGS} is missing)")
    wanted = {key: value for key, value in settings.items() if key not in OF_THE_BENT_SIDE}
    theirs = read_settings(other / SETTINGS, wanted, "another --base-of")
    rows = cast(list[AnswerRow], RowFile(other / "answers.jsonl").read(ANSWER_FIELDS, mend=False))
    rows = [row for row in rows if row["side"] == BASE and row["answers"]]
    if not rows:
        raise UserError(f"{other}: holds no answers of a base model; name an evaluation that has asked it")
    own = RowFile(folder / "answers.jsonl")
    there = {key_of(row) for row in cast(list[AnswerRow], own.read(ANSWER_FIELDS))}
    taken = [row for row in rows if key_of(row) not in there]
    for row in taken:
        own.append(row)
    _take_changes(folder, other)
    if "tokenizer" in theirs:  # compared with the model's own when it is loaded
        go_on(folder / SETTINGS, {"tokenizer": theirs["tokenizer"]})
    say(f"{folder}: {len(taken)} answers of the base are {other}'s")


def _take_changes(folder: Path, other: Path) -> None:
    """The models that attacks have made of the base, by what came of them: their answers are there."""
    found: dict[str, Change] = {k: v for k, v in read_changes(other / CHANGES).items() if v["side"] == BASE}
    if found:
        write_json(folder / CHANGES, found | read_changes(folder / CHANGES))
