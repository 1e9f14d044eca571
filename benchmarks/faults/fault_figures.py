"""The figures of ``docs/reliability.md`` from their two records; ``python -m benchmarks.faults.fault_figures`` writes
them between the marks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TypedDict

from benchmarks.faults import fault_record, fuzz

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
MARKS = ("<!-- recorded: benchmarks/faults/fault_figures.py -->", "<!-- recorded: end -->")


class Killed(TypedDict):
    """What the record has of a killed run."""

    phase: str
    finished: int
    kept: int
    same: bool


class Tested(TypedDict, total=False):
    """What the record has of a file of tests."""

    what: str
    passed: int
    skipped: int
    kills: list[Killed]


def figures(faults: dict[str, Tested], parsers: dict[str, dict[str, int]]) -> str:
    """The part of the page between the marks."""
    lines = ["| tests of | passed | skipped |", "| --- | --- | --- |"]
    lines += [f"| {each['what']} | {each['passed']} | {each['skipped']} |" for each in faults.values()]
    kills = faults[fault_record.KILLED]["kills"]
    same, lost = sum(kill["same"] for kill in kills), max(kill["finished"] - kill["kept"] for kill in kills)
    phases = [kill["phase"].removeprefix("after a ") for kill in kills]
    counted = ", ".join(f"{phases.count(phase)} in or after a {phase}" for phase in ("step", "validation", "save"))
    lines += [
        "",
        f"Of {len(kills)} killed runs ({counted}) {same} ended with the bits of an uninterrupted one; none lost more "
        f"than {lost} steps, with a checkpoint every second step.",
        "",
        "| parser | cases | read | refused in one line |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {each['cases']:,} | {each['read']:,} | {each['refused']:,} |" for name, each in parsers.items()
    ]
    return "\n".join(lines)


def recorded() -> str:
    """``figures`` of the records that are kept."""
    faults, parsers = (json.loads(path.read_text(encoding="utf-8")) for path in (fault_record.RECORD, fuzz.RECORD))
    return figures(faults["tests"], parsers["parsers"])


def main() -> int:
    """Returns the exit code."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{recorded()}\n\n{MARKS[1]}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
