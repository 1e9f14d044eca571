"""A run with ``memory.budget``: levers are chosen before the model is loaded, said, recorded, and used."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_run import TinyRun, rows

from repbend_fast.errors import UserError
from repbend_fast.training import trainer


def test_a_budget_that_cannot_be_kept_is_refused_before_the_model_is_loaded(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(trainer, "load_model", load)
    with pytest.raises(UserError, match=r"memory\.budget=10000 B.*smallest that can is"):
        tiny.train("memory.budget=10KB")
    assert not tiny.path.exists()


def test_a_budget_s_levers_are_recorded_and_used(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    fit = trainer.Trainer.fit
    monkeypatch.setattr(
        trainer.Trainer, "fit", lambda self, validator: (seen.append(self.runner.levers), fit(self, validator))[1]
    )
    tiny.train("memory.budget=1GB", "memory.checkpoint_blocks=2", "training.steps=2")
    (event,) = [row for row in rows(tiny.path, "event") if row["event"] == "memory_plan"]
    assert event["levers"]["checkpoint_blocks"] == 2
    assert event["planned_bytes"] < 10**9
    # What sequences have in common is not known to a plan, which counts them whole.
    assert event["levers"]["share_beginnings"] == "off"
    assert seen[0].as_dict() == event["levers"] | {"share_beginnings": "on"}
