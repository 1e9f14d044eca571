"""Data made by a tiny random model from end to end: resumed, and with blocks of another size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import write_model

import repbend_fast
from repbend_fast.errors import UserError
from repbend_fast.making import answering


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_a_model_writes_the_same_whatever_the_batch_size(
    write_policy: Callable[..., str], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model writes no language: everything that is not empty counts as of use here.
    monkeypatch.setattr(answering, "problem", lambda written: "" if written.text else "empty")
    counts = {"attacks": 3, "refused": 1, "allowed": 2, "ordinary": 2, "validation": 1, "test": 1}
    policy = write_policy(counts=counts, answer_tokens=8)
    said: list[str] = []
    for name, size in (("a", 8), ("b", 3)):
        given = ["training.autocast=none"]  # bfloat16 rounds by the shape of a batch
        repbend_fast.make_data(policy, tiny_model, tmp_path / name, given, batch_size=size, say=said.append)
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "rejected.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    answers = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    assert len({row["text"] for row in answers}) > 4
    assert any(row["start"] for row in answers)
    assert any("answers" in line for line in said)


def test_a_model_that_babbles_is_said_so(write_policy: Callable[..., str], tmp_path: Path, tiny_model: Path) -> None:
    counts = {"attacks": 2, "refused": 1, "allowed": 2, "ordinary": 2, "validation": 1, "test": 1}
    with pytest.raises(UserError, match="none of the 2 answers for train complying is of use; most often: degenerate"):
        repbend_fast.make_data(write_policy(counts=counts, answer_tokens=8), tiny_model, tmp_path / "made")
