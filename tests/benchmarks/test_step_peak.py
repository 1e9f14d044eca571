"""Of ``benchmarks/memory/at_peak.py``: its rows are the whole peak, and docs/memory.md shows the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.memory.at_peak import peak_of, table
from benchmarks.step.step_cases import cases_for, load_base
from benchmarks.step.step_sides import sides_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((ROOT / "benchmarks/results/step_peak_cpu.json").read_text(encoding="utf-8"))


def test_the_rows_add_up_to_the_peak_and_name_what_is_held():
    cpu = torch.device("cpu")
    case = cases_for(cpu, smoke=True)[0]
    sides = {side.name: side for side in sides_for(cpu, smoke=True)}
    base = load_base(case, cpu)
    peaks = {name: peak_of(sides[name], case, base) for name in ("peft+liger", "ours small")}
    for peak in peaks.values():
        assert sum(each["bytes"] for each in peak["held"]) == peak["peak_bytes_above_model"] > 0
    assert peaks["ours small"]["peak_bytes_above_model"] < peaks["peft+liger"]["peak_bytes_above_model"]
    assert peaks["ours small"]["levers"]["checkpoint_blocks"] > 0
    assert {each["made_by"] for each in peaks["ours small"]["held"]} >= {"low_rank_down", "mm"}


def test_the_docs_show_the_record(record: dict):
    text = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    for peak in record["peaks"]:
        assert table(peak) in text


def test_a_setting_of_ours_is_below_three_quarters_of_the_afternoon_s_work(record: dict):
    """The memory half of a goal; its time is the step benchmark's."""
    theirs, ours = (peak["peak_bytes_above_model"] for peak in record["peaks"])
    assert ours <= 0.75 * theirs
