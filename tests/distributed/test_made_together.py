"""``data make`` in two processes: the first writes, both generate."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from scripted_model import POLICY
from two_processes import torchrun

import repbend_fast
from repbend_fast.making import answering

COUNTS = {"attacks": 3, "refused": 1, "allowed": 2, "ordinary": 2, "validation": 1, "test": 1}
# A random model writes no language: everything that is not empty counts as of use.
COMMAND = """
import os
import sys
from pathlib import Path

from repbend_fast.cli import main
from repbend_fast.evaluation import generate
from repbend_fast.making import answering

if sys.argv[1] == "of-use":
    answering.problem = lambda written: "" if written.text else "empty"
batch = generate._generate_batch


def counted(model, tokenizer, encoded):
    with Path("asked-" + os.environ["RANK"]).open("a") as out:
        out.write(f"{len(encoded)}\\n")
    return batch(model, tokenizer, encoded)


generate._generate_batch = counted
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def in_two(tmp_path: Path, tiny_model: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs ``data make`` in two processes; the argument says which answers are of use."""
    (tmp_path / "making.py").write_text(COMMAND, encoding="utf-8")
    policy = {**POLICY, "counts": COUNTS, "answer_tokens": 8}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy), encoding="utf-8")

    def run(which: str) -> subprocess.CompletedProcess[str]:
        words = [which, "data", "make", "policy.yaml", "--model", str(tiny_model), "--out", "both"]
        return torchrun("making.py", *words, "--batch-size=2", "training.autocast=none", cwd=tmp_path)

    return run


def test_two_processes_make_what_one_makes(
    in_two: Callable[[str], subprocess.CompletedProcess[str]],
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = in_two("of-use")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train on it with:") == 1
    monkeypatch.setattr(answering, "problem", lambda written: "" if written.text else "empty")
    repbend_fast.make_data(tmp_path / "policy.yaml", tiny_model, tmp_path / "one", ["training.autocast=none"])
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "rejected.jsonl"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    written = len((tmp_path / "one" / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    assert len((tmp_path / "both" / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == written
    first, second = (
        sum(map(int, (tmp_path / f"asked-{rank}").read_text(encoding="utf-8").split())) for rank in range(2)
    )
    assert first == second
    assert first < written <= first + second


def test_what_ends_the_first_ends_the_second(in_two: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    done = in_two("as-judged")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line for line in lines if "none of the 3 answers for train complying is of use" in line] == lines
    assert len(lines) == 1
