"""What ``repbend-fast eval`` left in a folder: the summary and every answer, read so that a torn part is left out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repbend_fast.errors import one_line

Row = dict[str, Any]
SUMMARY, ANSWERS = "eval.json", "answers.jsonl"
BASE, BENT = SIDES = ("base", "bent")
# In the folder itself, in `eval/`, and in `eval/NAME/`; one that was killed has answers and no summary yet.
_PLACES = ("", "*/", "*/*/")


@dataclass(slots=True)
class EvalRecord:
    """``name``: its folder as seen from the run's. ``summary``: ``eval.json``. ``answers``: the rows of
    ``answers.jsonl``.
    """

    name: str
    summary: Row = field(default_factory=dict)
    answers: list[Row] = field(default_factory=list)


def read_evals(folder: Path) -> tuple[list[EvalRecord], list[str]]:
    """The evaluations in a run's folder, by name, and a line for each summary that cannot be read."""
    found, problems = [], []
    places = {path.parent for place in _PLACES for name in (SUMMARY, ANSWERS) for path in folder.glob(place + name)}
    for path in sorted(places):
        name = path.relative_to(folder).as_posix()
        summary, problem = json_mapping(path / SUMMARY) if (path / SUMMARY).is_file() else ({}, f"{SUMMARY} is missing")
        if problem:
            problems.append(f"{name}: {problem}; the same eval command makes it")
        found.append(EvalRecord(name, summary, answer_rows(path / ANSWERS)))
    return found, problems


def answer_rows(path: Path) -> list[Row]:
    """Rows with a side and a list of answers. An evaluation that was killed leaves a torn last line."""
    rows: list[Row] = []
    if not path.is_file():
        return rows
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and row.get("side") in SIDES and isinstance(row.get("answers"), list):
                rows.append(row)
    return rows


def json_mapping(path: Path) -> tuple[Row, str]:
    """The mapping in a JSON file, and why there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path.name} cannot be read ({one_line(error)})"
    return value if isinstance(value, dict) else {}, ""
