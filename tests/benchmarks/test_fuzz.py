"""Bad input is refused in one line by every parser: what failed before, and some new cases of each.

``make fuzz`` runs 100,000 of each. Hypothesis draws other cases of the same kinds here, and makes one that fails small.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.faults import fuzz
from benchmarks.faults.fuzz_draws import Files
from benchmarks.faults.fuzz_targets import TARGETS, Target

SLOW = {"adapters": 6, "checkpoints": 20, "recipes": 10, "overrides": 15, "golden": 30, "parquet": 30}
CASES = 40
pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an alarm")


@pytest.mark.parametrize("name", TARGETS)
def test_bad_input_is_refused_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path / "corpus")
    count, faults = fuzz.fuzz(name, range(SLOW.get(name, CASES)), tmp_path / "case")
    assert faults == []
    assert count.cases == count.read + count.refused == SLOW.get(name, CASES)


def by_hypothesis(name: str, folder: Path) -> None:
    """Cases that Hypothesis draws. Each is a fault or none by itself, so that a smaller one can be looked for."""

    @settings(
        max_examples=SLOW.get(name, CASES),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def one(draw: random.Random) -> None:
        files = TARGETS[name].make(draw)
        with fuzz.watched():
            fuzz.run_case(name, files, folder)

    fuzz.drawn(name, 0)  # what cases are made of is no case's own
    one()


@pytest.mark.parametrize("name", TARGETS)
def test_what_hypothesis_draws(name: str, tmp_path: Path) -> None:
    by_hypothesis(name, tmp_path / "case")


def test_what_hypothesis_draws_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "jsonl", Target(TARGETS["jsonl"].make, crash))
    with pytest.raises(KeyError):
        by_hypothesis("jsonl", tmp_path / "case")


@pytest.mark.parametrize("name", TARGETS)
def test_what_failed_before(name: str, tmp_path: Path) -> None:
    fuzz.drawn(name, 0)  # what cases are made of is no case's own
    with fuzz.watched():
        for file, files in fuzz.kept_cases(name):
            try:
                fuzz.run_case(name, files, tmp_path / "case")
            except Exception as error:
                raise AssertionError(file) from error


def test_a_case_is_its_number() -> None:
    for name in ("jsonl", "overrides", "gguf"):
        assert fuzz.drawn(name, 3) == fuzz.drawn(name, 3) != fuzz.drawn(name, 4)


def crash(folder: Path, files: Files) -> None:
    raise KeyError("a")


def write_elsewhere(folder: Path, files: Files) -> None:
    (folder.parent / "elsewhere").write_text("a")


def hang(folder: Path, files: Files) -> None:
    time.sleep(5)


def compute(folder: Path, files: Files) -> None:
    end = time.process_time() + 5
    while time.process_time() < end:
        pass


@pytest.mark.parametrize("fault", [crash, write_elsewhere, hang, compute])
def test_faults_are_found_and_kept(fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(fuzz, "LONGEST" if fault is compute else "WAITED", 0.05)
    monkeypatch.setitem(TARGETS, "gguf", Target(TARGETS["gguf"].make, fault))  # type: ignore[arg-type]
    count, faults = fuzz.fuzz("gguf", range(9), tmp_path / "case")
    assert faults == [0, 1, 2, 3, 4]
    assert count.cases == 5
    kept = dict(fuzz.kept_cases("gguf"))
    assert kept["gguf-0.json"] == fuzz.drawn("gguf", 0)
