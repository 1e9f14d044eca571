"""A run whose streams share their passes is the run whose streams do not, also when it is interrupted or short of
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_out_of_memory import SHORT, break_call, distance
from test_resume import interrupt_at
from tiny_run import TinyRun, adapter_of, reproducible, rows, same_tensors

from repbend_fast.step import adapted
from repbend_fast.training.trainer import INTERRUPTED

__all__ = ["interrupt_at"]
MERGED = "memory.merge_streams=on"


@pytest.fixture(scope="module")
def apart(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    run = TinyRun(tiny_model, tmp_path_factory.mktemp("apart"))
    run.train(*SHORT)
    return run


def assert_the_run(found: TinyRun, expected: TinyRun) -> None:
    for got, row in zip(rows(found.path, "step"), rows(expected.path, "step"), strict=True):
        assert got["tokens"] == row["tokens"]
        assert got["terms"].keys() == row["terms"].keys()
        assert got["distance_per_layer"].keys() == row["distance_per_layer"].keys()
        for name, value in row["terms"].items():
            assert got["terms"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert got["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
    assert distance(adapter_of(found.path), adapter_of(expected.path)) < 2e-3


def test_the_run_is_that_of_separate_streams(tiny: TinyRun, apart: TinyRun) -> None:
    tiny.train(*SHORT, MERGED)
    assert_the_run(tiny, apart)
    assert not [row for row in rows(tiny.path, "event") if row["event"] == "out_of_memory"]


def test_interrupted_and_resumed_equals_uninterrupted(
    tiny: TinyRun, tiny_model: Path, tmp_path: Path, interrupt_at: Callable[[int], None]
) -> None:
    straight = TinyRun(tiny_model, tmp_path / "straight")
    straight.train(MERGED)
    interrupt_at(3)
    assert tiny.train(MERGED).exit_code == INTERRUPTED
    interrupt_at(99)
    assert tiny.resume().exit_code == 0
    assert reproducible(tiny.path) == reproducible(straight.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(straight.path))


def test_out_of_memory_separates_the_streams_and_is_recorded(tiny: TinyRun, apart: TinyRun, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        break_call(patch, adapted, "run_decoder", step=3, nth=1)
        tiny.train(*SHORT, MERGED)
    assert_the_run(tiny, apart)
    (event,) = [row for row in rows(tiny.path, "event") if row["event"] == "out_of_memory"]
    assert event["reason"].startswith("out of memory (streams safe and unsafe and retain, ")
    assert event["reason"].endswith(": one stream after the other from here on")
    assert event["levers"]["merge_streams"] == "off"
