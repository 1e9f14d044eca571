"""Interrupted, failed and changed comparisons: what is finished is used again, what is half is resumed, and nothing
else is trusted.
"""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_comparison import InProcess, TinyComparison
from tiny_run import adapter_of, rows, same_tensors

from repbend_fast.cli import main
from repbend_fast.compare.command import run_compare
from repbend_fast.errors import UserError
from repbend_fast.runs.folder import RunFolder, only_writer
from repbend_fast.training.trainer import Trainer

RATES = ("--rates", "1e-2", "3e-2")


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """``interrupt["at"] = n``: Ctrl-C arrives in the n-th training step from then on."""
    countdown: dict[str, int] = {}
    step = Trainer._train_step

    def counted(self: Trainer, progress: object) -> None:
        step(self, progress)  # type: ignore[arg-type]
        if countdown.get("at"):
            countdown["at"] -= 1
            if not countdown["at"]:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", counted)
    return countdown


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_the_printed_line_goes_on_where_it_stopped(
    tiny: TinyComparison, in_process: InProcess, interrupt: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt["at"] = 4 + 3  # the second rate's third step of four
    assert tiny.compare(*RATES, "training.checkpoint_every=9", recipes=[tiny.bend]) == 130
    assert in_process.take() == ["train bend/seed-0/lr-1e-02", "train bend/seed-0/lr-3e-02"]
    out, err = capsys.readouterr()
    assert err == ""
    [line] = [line for line in out.splitlines() if "go on with: " in line]
    command = shlex.split(line.partition("go on with: ")[2])
    assert command[:3] == ["repbend-fast", "compare", str(tiny.bend)]
    assert main(command[1:]) == 0
    assert in_process.take()[:2] == ["resume bend/seed-0/lr-3e-02", "eval before"]
    half = tiny.run("bend/seed-0/lr-3e-02")
    assert [row["step"] for row in rows(half, "step")] == [1, 2, 3, 4]
    alone = tiny.folder / "alone"
    again = ["training.learning_rate=3e-2", "training.seed=0", "evaluation.prompts=null", f"output.folder={alone}"]
    assert main(["train", str(tiny.bend), *again]) == 0
    assert same_tensors(adapter_of(alone), adapter_of(half))


def test_interrupted_while_measuring_trains_nothing_again(tiny: TinyComparison, in_process: InProcess) -> None:
    def stop(arguments: list[str]) -> None:
        if "--resume" in arguments:
            raise KeyboardInterrupt

    in_process.before = stop
    assert tiny.compare("--rates", "1e-2", recipes=[tiny.bend]) == 130
    assert in_process.take() == ["train bend/seed-0/lr-1e-02", "eval before", "resume bend/seed-0/lr-1e-02"]
    assert not (tiny.out / "compare.json").exists()
    in_process.before = lambda arguments: None
    assert tiny.compare("--rates", "1e-2", recipes=[tiny.bend]) == 0
    assert in_process.take() == ["resume bend/seed-0/lr-1e-02"]


def test_other_evaluation_settings_only_measure_again_also_when_that_is_interrupted(
    tiny: TinyComparison, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    assert tiny.compare("--rates", "1e-2", recipes=[tiny.bend]) == 0
    in_process.take()
    other = ("--rates", "1e-2", "evaluation.batch_size=1")
    with monkeypatch.context() as patch:
        patch.setattr("repbend_fast.training.trainer.evaluate_sides", interrupted)
        assert tiny.compare(*other, recipes=[tiny.bend]) == 130
    assert in_process.take() == ["eval before", "resume bend/seed-0/lr-1e-02"]
    assert tiny.compare(*other, recipes=[tiny.bend]) == 0
    assert in_process.take() == ["resume bend/seed-0/lr-1e-02"]


def test_other_training_settings_move_the_old_run_aside(tiny: TinyComparison, in_process: InProcess) -> None:
    assert tiny.compare("--rates", "1e-2", recipes=[tiny.bend]) == 0
    in_process.take()
    assert tiny.compare("--rates", "1e-2", "training.steps=2", recipes=[tiny.bend]) == 0
    assert in_process.take()[0] == "train bend/seed-0/lr-1e-02"
    assert len(rows(tiny.run("bend/seed-0/lr-1e-02"), "step")) == 2
    assert len(rows(tiny.run("bend/seed-0/lr-1e-02.1"), "step")) == 4


def test_a_rate_too_high_breaks_off_and_is_not_chosen(
    tiny: TinyComparison, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.compare("--rates", "1e30", "1e-2", recipes=[tiny.bend]) == 0
    search = tiny.record["search"][str(tiny.bend)]
    assert search["chosen"] == 0.01
    assert "the loss is not finite" in search["runs"][0]["broke_off"]
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if "broke off" in line]
    assert line.endswith(f"see {tiny.run('bend/seed-0/lr-1e+30.log')}")
    in_process.take()
    assert tiny.compare("--rates", "1e30", "1e-2", recipes=[tiny.bend]) == 0
    assert in_process.take() == []


def test_no_rate_that_trains_is_one_line(
    tiny: TinyComparison, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.compare("--rates", "1e30", recipes=[tiny.bend]) == 2
    assert "repbend: no learning rate could be trained to the end" in error_line(capsys)


def test_a_failed_run_is_one_line_and_nothing_is_lost(
    tiny: TinyComparison, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> None:
        if "lr-3e-02" in arguments[1]:
            Path(tiny.folder / "train.jsonl").rename(tiny.folder / "away.jsonl")

    in_process.before = fail
    assert tiny.compare(*RATES, recipes=[tiny.bend]) == 2
    line = error_line(capsys)
    log = tiny.run("bend/seed-0/lr-3e-02.log")
    for part in ("repbend, learning rate 0.03, seed 0", "exit code 2", "train.jsonl: no such file", f"see {log}"):
        assert part in line
    assert in_process.take() == ["train bend/seed-0/lr-1e-02", "train bend/seed-0/lr-3e-02"]
    (tiny.folder / "away.jsonl").rename(tiny.folder / "train.jsonl")
    in_process.before = lambda arguments: None
    assert tiny.compare(*RATES, recipes=[tiny.bend]) == 0
    assert in_process.take()[0] == "train bend/seed-0/lr-3e-02"


def test_one_comparison_at_a_time_in_a_folder(tmp_path) -> None:
    comparison: Any = SimpleNamespace(folder=tmp_path)
    writing = rf"another comparison is writing to this folder \(process {os.getpid()}\).*--out"
    with only_writer(RunFolder(tmp_path)), pytest.raises(UserError, match=writing):
        run_compare(comparison, "again")
    assert list(tmp_path.iterdir()) == []
