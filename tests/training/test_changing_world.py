"""What changes around a run while it trains: its data, the clock, another process in its folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TinyRun, adapter_of, records, reproducible, same_tensors, write_records

from repbend_fast.cli import main
from repbend_fast.runs.folder import RunFolder
from repbend_fast.training.trainer import Trainer

Change = Callable[[Path], object]
CHANGES: dict[str, Change] = {
    "other records": lambda path: write_records(path, records(first=40)),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "gone": lambda path: path.unlink(),
}


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """``after_step(n, do)`` does something once that step is done."""

    def install(step: int, do: Callable[[], object]) -> None:
        real = Trainer._train_step

        def stepped(self: Trainer, *arguments: Any) -> None:
            real(self, *arguments)
            if self.step == step:
                do()

        monkeypatch.setattr(Trainer, "_train_step", stepped)

    return install


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_changes_during_a_run_change_nothing_in_it_and_stop_its_resuming(
    change: str,
    whole: TinyRun,
    tiny: TinyRun,
    after_step: Callable[[int, Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tiny.folder / "train.jsonl"
    after_step(3, lambda: CHANGES[change](data))
    assert main(["train", str(tiny.recipe)]) == 0
    assert reproducible(tiny.path) == reproducible(whole.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))
    before = {path: path.read_bytes() for path in tiny.path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["train", "--resume", str(tiny.path), "training.steps=8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    named = "data, tokenizer or token limits differ from those of the checkpoint" if change == "other records" else data
    assert str(named) in error
    assert {path: path.read_bytes() for path in tiny.path.rglob("*") if path.is_file()} == before
    write_records(data, records())
    assert main(["train", "--resume", str(tiny.path), "training.steps=8"]) == 0


def test_a_clock_that_goes_back_changes_nothing(
    whole: TinyRun, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, after_step: Callable[..., None]
) -> None:
    """Neither the order of checkpoints nor which of them is kept is a matter of time."""
    now = [time.time()]

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", earlier)

    def age() -> None:
        for path in sorted((tiny.path / "checkpoints").rglob("*")):
            os.utime(path, (earlier(), earlier()))

    after_step(5, age)
    assert main(["train", str(tiny.recipe), "training.keep_checkpoints=2"]) == 0
    assert [path.name for path in RunFolder(tiny.path).all_checkpoints()] == ["step-000004", "step-000006"]
    assert main(["train", "--resume", str(tiny.path), "training.steps=6"]) == 0
    assert reproducible(tiny.path) == reproducible(whole.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(
    whole: TinyRun, tiny: TinyRun, after_step: Callable[..., None], tmp_path: Path
) -> None:
    said = tmp_path / "said"

    def second() -> None:
        child = os.fork()
        if not child:
            code = 9
            try:
                sys.stderr = said.open("w")
                code = main(["train", "--resume", str(tiny.path)]) * 10 + main(["train", str(tiny.recipe)])
                sys.stderr.flush()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 22

    after_step(3, second)
    assert main(["train", str(tiny.recipe)]) == 0
    assert said.read_text().count(f"another training is writing to this folder (process {os.getpid()})") == 2
    assert not (tiny.folder / "run.1").exists()
    assert reproducible(tiny.path) == reproducible(whole.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))
