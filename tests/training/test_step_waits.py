"""An optimizer step waits for the device once, to check that its gradient is finite; only logging steps read more."""

from __future__ import annotations

import pytest
from host_syncs import watched_steps
from tiny_run import TinyRun, rows


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_step_waits_once(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    waits = watched_steps(monkeypatch)
    tiny.train(
        "training.steps=4",
        "training.log_every=4",
        "validation.every=0",
        f"training.optimizer={optimizer}",
        "training.warmup_steps=0",
    )
    looking, first, second, logging = waits
    # The first step looks at its own distances too, which are 0 before anything has moved.
    assert sum("zero_start.py" not in wait for wait in looking) == 1, looking
    assert len(first) == len(second) == 1, first + second
    assert "trainer.py" in first[0]
    # The last step is logged: loss, terms, distances of layers and the norm are read then, and nowhere else.
    assert len(logging) > 5
    assert [row["step"] for row in rows(tiny.path, "step")] == [4]
