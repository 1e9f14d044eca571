"""``answers.jsonl`` of an evaluation: a row for each prompt, attack and side, written as it comes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from repbend_fast.assessment.json_rows import AnswerRow
from repbend_fast.errors import UserError
from repbend_fast.runs.folder import finite, saving, write_bytes

Key = tuple[str, str, str, int]
"""Side, suite, attack, and the prompt's index in its suite."""


def key_of(row: AnswerRow) -> Key:
    """What tells a row from all others."""
    return row["side"], row["suite"], row["attack"], row["index"]


ANSWER_FIELDS = ("side", "suite", "attack", "index", "kind", "answers", "opinions")
OPINION_FIELDS = ("key", "judge", "opinions")


class RowFile:
    """A file of JSON rows that is only ever appended to. ``what`` it belongs to, as messages call it, and ``remedy``:
    what to give in its place.
    """

    def __init__(self, path: Path, what: str = "an evaluation", remedy: str = "another --out") -> None:
        self.path, self.what, self.remedy = path, what, remedy

    def read(self, fields: Sequence[str], *, mend: bool = True) -> list[dict[str, object]]:
        """What is there. A last line that a kill has torn is dropped, with ``mend`` from the file too.

        Raises:
            UserError: any other line is no row with ``fields``; it names file and line.
        """
        if not self.path.is_file():
            return []
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        rows = [self._row(number, line, fields) for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1)]
        if mend and whole < len(data):
            with saving(self.path.name, self.path):
                os.truncate(self.path, whole)
        return rows

    def _row(self, number: int, line: bytes, fields: Sequence[str]) -> dict[str, object]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not set(fields) <= row.keys():
            raise UserError(f"{self.path}:{number}: not a row of {self.what}; remove the line, or give {self.remedy}")
        return row

    def append(self, row: Mapping[str, object]) -> None:
        """Write one row; it is with the operating system when this returns, and survives the process."""
        line = encoded(row)
        with saving(self.path.name, self.path), open(self.path, "ab") as file:
            file.write(line)

    def rewrite(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Replace all rows at once, atomically."""
        write_bytes(self.path, b"".join(map(encoded, rows)))


def encoded(row: Mapping[str, object]) -> bytes:
    """One line of JSON in UTF-8.

    Half a surrogate pair, which JSON files may hold, stays an escape; and so do the separators that other programs take
    for the end of a line.
    """
    text = json.dumps(finite(dict(row)), ensure_ascii=False, allow_nan=False)
    for mark in ("\u2028", "\u2029", "\u0085"):
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(finite(dict(row)), allow_nan=False).encode("ascii") + b"\n"


def ordered(rows: Mapping[Key, AnswerRow], order: Iterator[Key]) -> list[AnswerRow]:
    """The rows in the order of ``order``, then whatever it does not name, as it came."""
    wanted = [key for key in order if key in rows]
    rest = set(rows) - set(wanted)
    return [rows[key] for key in wanted] + [row for key, row in rows.items() if key in rest]
