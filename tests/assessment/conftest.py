from __future__ import annotations

from pathlib import Path

import pytest
from bent_target import bent, target_of
from run_fixtures import tiny_model
from tiny_run import records, write_records

from repbend_fast.evaluation.attacks.protocol import Target

__all__ = ["tiny_model"]


@pytest.fixture
def target(tiny_model: Path) -> Target:
    return target_of(bent(tiny_model), tiny_model)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_records(tmp_path / "attacker.jsonl", records(count=12)))
