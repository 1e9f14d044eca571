"""What a checkpoint holds comes back as it was, and one that an earlier version wrote is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from repbend_fast.training.checkpoint import SavedState, TrainingState

WRITTEN: dict[str, Any] = {
    "step": 3,
    "sampler": {"places": {}},
    "guard": {"before": None},
    "stopped": "stopped at step 3: target",
    "settings": {"lora.r": 4},
    "limits": {"max_kl": 0.1},
}


def state(**changed: Any) -> TrainingState:
    values = WRITTEN | {
        "units": {2: 1.5, 11: 0.25},
        "kl_weight": 0.5,
        "first_levers": {"kl_chunk_rows": 4},
        "last_levers": {"kl_chunk_rows": 2},
        "optimizer": {"state": {}},
        "scaler": {},
        "best": {"a": torch.ones(2)},
    }
    return TrainingState(**values | changed)


def test_what_is_written_is_what_is_read() -> None:
    written = state()
    saved = SavedState.from_json(json.loads(json.dumps(written.as_json())))
    read = TrainingState.of(saved, written.tensors())
    assert read == written
    assert read.units == {2: 1.5, 11: 0.25}
    assert not {"optimizer", "scaler", "best"} & written.as_json().keys()


def test_the_content_of_the_file_is_what_it_was() -> None:
    assert state().as_json() == WRITTEN | {
        "format": 1,
        "units": {"2": 1.5, "11": 0.25},
        "kl_weight": 0.5,
        "levers": {"first": {"kl_chunk_rows": 4}, "last": {"kl_chunk_rows": 2}},
    }


def test_a_checkpoint_of_an_earlier_version_has_no_units_levers_or_weight() -> None:
    saved = SavedState.from_json({"format": 1} | WRITTEN)
    assert (saved.units, saved.kl_weight, saved.first_levers, saved.last_levers) == ({}, None, {}, {})


@pytest.mark.parametrize("name", WRITTEN)
def test_what_every_checkpoint_has_is_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match=f"^state.json has no {name}$"):
        SavedState.from_json({key: value for key, value in WRITTEN.items() if key != name})
