"""Plans of two commits, field by field."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.memory.plan_versions import difference, planned

ROOT = Path(__file__).parents[2]


def test_what_differs_is_named_with_both_values() -> None:
    old = {"levers": {"a": 1}, "total_bytes": 7, "gone": 1}
    assert difference(old, {"levers": {"a": 1}, "total_bytes": 8, "new": 2}) == {
        "different": {
            "total_bytes": {"old": 7, "new": 8},
            "gone": {"old": 1, "new": None},
            "new": {"old": None, "new": 2},
        },
        "equal": ["levers"],
    }
    assert difference({"levers": {"a": 1}}, {"levers": {"a": 1, "new": 2}})["equal"] == ["levers"]
    assert difference({"levers": {"a": 1}}, {"levers": {"a": 2, "new": 2}})["equal"] == []


def test_a_plan_that_is_refused_is_its_error() -> None:
    (kept,) = planned(ROOT, ["no-such-recipe"]).values()
    assert "no recipe is called no-such-recipe" in str(kept)


def test_every_recipe_of_before_is_in_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "plans_house.json").read_text(encoding="utf-8"))
    assert len(record["plans"]) >= 3
    assert all(set(plan) == {"different", "equal"} for plan in record["plans"].values())
