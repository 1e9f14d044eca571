"""The folder of an evaluation while it is worked on: what is to be asked, and what has been answered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from repbend_fast.assessment.answers import ANSWER_FIELDS, OPINION_FIELDS, Key, RowFile, key_of
from repbend_fast.assessment.json_rows import AnswerRow, Change, JudgedRow
from repbend_fast.assessment.suites import Suite
from repbend_fast.errors import UserError
from repbend_fast.evaluation.attacks.protocol import Attacked
from repbend_fast.evaluation.options import Named
from repbend_fast.runs.folder import write_json


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
        self._changes_file = folder / "changes.json"
        self._changes = self._read_changes()

    def _read_changes(self) -> dict[str, Change]:
        try:
            return dict(json.loads(self._changes_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{self._changes_file}: cannot be read; remove it, and its models are made again"
            ) from error

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
        return keys is None or any(key not in self.rows for key in keys)

    def missing(self, side: str, cell: Cell, attack: str) -> list[int]:
        """Prompts without an answer under ``attack``, which is the cell's or one of the models that it made."""
        return [index for index in cell.indices if (side, cell.suite.name, attack, index) not in self.rows]

    def asked(self) -> Iterator[Key]:
        """The keys of this evaluation that are known, in the order of its records."""
        for side in self.sides:
            for cell in self.cells:
                yield from self.keys(side, cell) or ()

    def add(self, side: str, cell: Cell, attack: str, index: int, result: Attacked) -> bool:
        """Write the answers to one prompt, unless it has some; whether it had none."""
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
        if key_of(row) in self.rows:
            return False
        self.answers.append(row)
        self.rows[key_of(row)] = row
        return True

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
        """Where an attack keeps what it has finished of the models that it makes."""
        return self.folder / "changes" / "".join(c if c.isalnum() or c in "-_" else "-" for c in _name(side, cell))


def _name(side: str, cell: Cell) -> str:
    return f"{side} {cell.suite.name} {cell.attack.label}"
