"""What latent adversarial training adds to a step's memory: the record keeps the limit, and what makes it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shape_recipes import LONGEST, recipe

from benchmarks.memory.attacked_memory import RECIPES, RECORD, row_of

MORE = 1.3


@pytest.mark.parametrize("method", RECIPES)
def test_the_recorded_step_takes_little_more(method: str) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    (row,) = [row for row in record["rows"] if row["method"] == method]
    assert (row["blocks"], row["recipe"]) == (32, RECIPES[method])
    assert row["ratio"] == pytest.approx(max(row["streams"].values()) / row["without"], abs=1e-3)
    assert any(name.startswith("perturbed") for name in row["streams"])
    assert 1.0 <= row["ratio"] <= MORE


def test_what_is_recorded_is_planned(tmp_path: Path) -> None:
    """On a shape of a few blocks: the streams of a step, and those that a search makes larger."""
    recipe(tmp_path, layers=4)
    small = [f"model.name={tmp_path}", "model.dtype=float32", "objective.layers=[2,3]"]
    limits = [f"data.max_prompt_tokens={LONGEST}", f"data.max_answer_tokens={LONGEST}"]
    row = row_of("circuit_breaker", RECIPES["circuit_breaker"], *small, *limits)
    assert row["streams"].keys() == {"forget", "retain", "refusal", "perturbed_forget", "perturbed_refusal"}
    assert (row["blocks"], row["longest"]) == (4, 2 * LONGEST)
    assert row["streams"]["perturbed_refusal"] > row["streams"]["refusal"]
    assert row["without"] == max(row["streams"][name] for name in ("forget", "retain", "refusal"))
