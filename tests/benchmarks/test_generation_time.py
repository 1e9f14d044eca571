"""The comparison of generation runs, and both sides write the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.evaluation import generation_time


def test_both_sides_are_measured_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_time, "NEW", 3)
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["generation_time", "--prompts", "2", "--rounds", "2", "--out", str(out)])
    generation_time.main()
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["tokens"] == {"transformers": 6, "ours": 6}
    assert [len(found) for found in row["seconds"].values()] == [2, 2]
    assert row["speedup"] == pytest.approx(row["median_seconds"]["transformers"] / row["median_seconds"]["ours"])
