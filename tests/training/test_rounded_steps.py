"""``training.nf4_every``: which steps of a run have rounded weights, and that the run resumes to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_run import TinyRun, adapter_of, reproducible, rows, same_tensors

from repbend_fast.errors import UserError

FOUR = ("training.steps=4", "training.checkpoint_every=3", "training.accumulation=1")


def test_every_other_step_is_rounded_and_a_resumed_run_is_the_same(tiny: TinyRun, tmp_path: Path) -> None:
    assert tiny.train(*FOUR).exit_code == 0
    plain = rows(tiny.path, "step")
    assert not any("nf4" in row for row in plain)
    assert tiny.train(*FOUR, "training.nf4_every=2").exit_code == 0
    steps = rows(tiny.path, "step")
    assert [row.get("nf4", False) for row in steps] == [False, True, False, True]
    assert steps[0]["terms"] == plain[0]["terms"]
    assert steps[1]["terms"] != plain[1]["terms"]
    whole = tmp_path / "whole"
    shutil.copytree(tiny.path, whole)
    shutil.rmtree(tiny.path / "checkpoints" / "step-000004")
    shutil.rmtree(tiny.path / "adapter")
    assert tiny.resume().exit_code == 0
    assert reproducible(tiny.path) == reproducible(whole)
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole))


def test_the_first_step_may_be_rounded(tiny: TinyRun) -> None:
    """At B = 0 the rounded passes are equal, which the run checks."""
    assert tiny.train("training.steps=1", "training.warmup_steps=0", "training.nf4_every=1").exit_code == 0
    (step,) = rows(tiny.path, "step")
    assert step["nf4"]
    assert step["terms"]["unsafe"] == step["terms"]["safe"] == 0.0


def test_weights_that_are_divided_cannot_be_rounded_whole(tiny: TinyRun) -> None:
    with pytest.raises(UserError, match=r"training.nf4_every=2 rounds whole weights.*leave nf4_every out"):
        tiny.config("training.nf4_every=2", "distributed.shard=fsdp")
