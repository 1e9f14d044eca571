"""The folder of an evaluation while it is worked on: what is to be asked, and what has been answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from repbend_fast.assessment.answers import ANSWER_FIELDS, OPINION_FIELDS, Key, RowFile, key_of
from repbend_fast.assessment.json_rows import AnswerRow, Change, JudgedRow
from repbend_fast.assessment.suites import Suite
from repbend_fast.console import note
from repbend_fast.data.prompts import Prompt
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.protocol import Attacked
from repbend_fast.evaluation.options import Named
from repbend_fast.runs.folder import saving, write_json

ERROR = "error"
"""In a row's details: why there are no answers."""


CHANGES = "changes.json"


def read_changes(path: Path, remedy: str = "remove it, and its models are made again") -> dict[str, Change]:
    """The models that attacks have made, by side, suite and attack; none where there is no file.

    Raises:
        UserError: a file that cannot be read, with the ``remedy``.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read; {remedy}") from error


@dataclass(frozen=True)
class Cell:
    """The prompts of one suite that one attack asks, by index."""

    suite: Suite
    attack: Named
    indices: tuple[int, ...]
    max_new_tokens: int

    @property
    def changes_model(self) -> bool:
        """Whether the attack gives models to be asked, which it names itself, and not answers."""
        return hasattr(self.attack.kind, "variants")


class Session:
    """Rows by key, those of an earlier run of the same evaluation included, and the models that attacks made.

    Raises:
        UserError: files of the folder that are none of an evaluation.
    """

    def __init__(self, folder: Path, sides: tuple[str, ...], cells: list[Cell]) -> None:
        self.folder, self.sides, self.cells = folder, sides, cells
        self.answers = RowFile(folder / "answers.jsonl")
        self.opinions = RowFile(folder / "opinions.jsonl")
        answered = cast(list[AnswerRow], self.answers.read(ANSWER_FIELDS))
        self.rows = {key_of(row): row for row in answered}
        for said in cast(list[JudgedRow], self.opinions.read(OPINION_FIELDS)):
            if (key := cast(Key, tuple(said["key"]))) in self.rows:
                self.rows[key]["opinions"][said["judge"]] = said["opinions"]
        self.failed: list[dict[str, str]] = []
        """Parts that could not go on, with the reason; the prompts that are left are asked by a later run."""
        self._changes_file = folder / CHANGES
        self._changes = read_changes(self._changes_file)

    def keys(self, side: str, cell: Cell) -> list[Key] | None:
        """The rows that a cell comes to; None of one whose models are still to be made."""
        if not cell.changes_model:
            return [(side, cell.suite.name, cell.attack.label, index) for index in cell.indices]
        made = self._changes.get(_name(side, cell))
        if made is None:
            return None
        return [(side, cell.suite.name, variant, index) for variant in made["variants"] for index in cell.indices]

    def unfinished(self, side: str) -> list[Cell]:
        """Cells of a side that have prompts without an answer."""
        return [cell for cell in self.cells if cell.indices and self._open(self.keys(side, cell))]

    def _open(self, keys: list[Key] | None) -> bool:
        return keys is None or any(not self.answered(key) for key in keys)

    def answered(self, key: Key) -> bool:
        """Whether there are answers; one that an error was kept of is asked again by a later run."""
        return key in self.rows and ERROR not in self.rows[key].get("details", {})

    def missing(self, side: str, cell: Cell, attack: str) -> list[int]:
        """Prompts without an answer under ``attack``, which is the cell's or one of the models that it made."""
        return [index for index in cell.indices if not self.answered((side, cell.suite.name, attack, index))]

    def asked(self) -> Iterator[Key]:
        """The keys of this evaluation that are known, in the order of its records."""
        for side in self.sides:
            for cell in self.cells:
                yield from self.keys(side, cell) or ()

    def add(self, side: str, cell: Cell, attack: str, index: int, result: Attacked) -> bool:
        """Write the answers to one prompt, or why there are none, unless it has some; whether it had none."""
        prompt = cell.suite.prompts[index]
        row: AnswerRow = {
            "side": side,
            "suite": cell.suite.name,
            "attack": attack,
            "index": index,
            "source_id": prompt.source_id,
            "kind": prompt.kind,
            "prompt": prompt.text,
            "item": prompt.item,
            "answers": list(result.answers),
            "prefills": list(result.prefills),
            "details": result.details,
            "opinions": {},
        }
        if self.answered(key_of(row)):
            return False
        self.answers.append(row)
        self.rows[key_of(row)] = row
        return True

    def add_error(self, side: str, cell: Cell, attack: str, index: int, error: UserError) -> None:
        """Write down that one prompt could not be asked: a row without answers, which every judge leaves unparsed."""
        self.add(side, cell, attack, index, Attacked(index, (), details={ERROR: str(error)}))
        note(f"{side} {cell.suite.name} {attack}, prompt {index}: {error}")

    def fail(self, side: str, cell: Cell, error: UserError) -> None:
        """Keep that a part cannot go on, and say so: the other parts can."""
        self.failed.append({"side": side, "suite": cell.suite.name, "attack": cell.attack.label, "reason": str(error)})
        note(f"{_name(side, cell)} cannot go on: {error}")

    def known(self) -> list[AnswerRow]:
        """The rows that there are, in the order of :meth:`asked`."""
        return [self.rows[key] for key in self.asked() if key in self.rows]

    def prompts(self) -> dict[tuple[str, int], Prompt]:
        """Every prompt by its suite's name and its index."""
        return {(cell.suite.name, i): cell.suite.prompts[i] for cell in self.cells for i in cell.indices}

    def add_change(self, side: str, cell: Cell, variants: list[str], summary: Mapping[str, object]) -> None:
        """Keep which models an attack made, and what it measured on the way."""
        self._changes[_name(side, cell)] = {
            "side": side,
            "suite": cell.suite.name,
            "attack": cell.attack.label,
            "variants": variants,
            "summary": summary,
        }
        write_json(self._changes_file, self._changes)

    def changes(self) -> list[Change]:
        """What :meth:`add_change` kept of this evaluation's cells."""
        names = [_name(side, cell) for side in self.sides for cell in self.cells if cell.changes_model]
        return [self._changes[name] for name in names if name in self._changes]

    def change_folder(self, side: str, cell: Cell) -> Path:
        """Where an attack keeps what it has finished of the models that it makes; it is there then."""
        name = _name(side, cell)
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)
        # Settings may be long and differ in marks alone, and a file system's names are short.
        mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        path = self.folder / "changes" / f"{plain[:80]}-{mark}"
        with saving("the models of an attack", path):
            path.mkdir(parents=True, exist_ok=True)
        return path


def _name(side: str, cell: Cell) -> str:
    return f"{side} {cell.suite.name} {cell.attack.label}"
