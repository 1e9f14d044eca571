"""What ``docs/reliability.md`` says was recorded, was."""

from __future__ import annotations

import json

from benchmarks.faults import fault_record, fuzz
from benchmarks.faults.fault_figures import MARKS, PAGE, recorded
from benchmarks.faults.fuzz_targets import TARGETS


def test_the_page_has_the_records_figures() -> None:
    between = PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert between.strip() == recorded()


def test_the_records_hold() -> None:
    """30 kills without a loss beyond the last checkpoint; every case was read or refused."""
    faults = json.loads(fault_record.RECORD.read_text(encoding="utf-8"))["tests"]
    assert set(faults) <= set(fault_record.TESTS)
    kills = faults[fault_record.KILLED]["kills"]
    assert len(kills) == fault_record.KILLS
    assert all(kill["same"] and kill["finished"] - kill["kept"] <= 2 for kill in kills)
    parsers = json.loads(fuzz.RECORD.read_text(encoding="utf-8"))["parsers"]
    assert set(parsers) <= set(TARGETS)
    for name, found in parsers.items():
        assert found["cases"] == found["read"] + found["refused"], name
        assert found["read"] > 0, name
