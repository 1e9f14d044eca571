"""Killed at random moments, a run loses no more than the steps since its last checkpoint and ends with the same bits.

``make test-faults`` sets ``KILLS`` to 30 and ``KILLS_RECORD`` to where each of them is noted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from killed_runs import PHASES, Kill, kills
from tiny_run import TinyRun

COUNT = int(os.environ.get("KILLS", "3"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_run_killed_at_a_random_moment_loses_nothing(whole: TinyRun, tmp_path: Path) -> None:
    every = whole.config().training.checkpoint_every
    found: list[Kill] = []
    for kill in kills(whole, tmp_path, seed=23, count=COUNT):
        found.append(kill)
        assert kill.finished - kill.kept <= every, kill
        assert kill.same, kill
    assert len(found) == COUNT
    assert {kill.phase.removeprefix("after a ") for kill in found} == set(PHASES)
    if record := os.environ.get("KILLS_RECORD"):
        Path(record).write_text(json.dumps([kill.as_dict() for kill in found]), encoding="utf-8")
