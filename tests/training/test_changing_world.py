"""What changes around a run while it trains: its data, its folder, its terminal, the clock, another process in its
folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TinyRun, adapter_of, events, records, reproducible, same_tensors, write_records

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


GONE: dict[str, Change] = {
    "the folder": shutil.rmtree,
    "the folder, moved away": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "its settings": lambda folder: (folder / "config.yaml").unlink(),
}


@pytest.mark.parametrize("gone", GONE)
def test_what_is_removed_during_a_run_is_written_again(
    gone: str, whole: TinyRun, tiny: TinyRun, after_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    after_step(3, lambda: GONE[gone](tiny.path))
    assert main(["train", str(tiny.recipe)]) == 0
    assert "was removed or moved away while the run trains; it is written again" in capsys.readouterr().out
    assert [row["step"] for row in events(tiny.path) if row["event"] == "folder_made_again"] == [3]
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))
    assert main(["train", "--resume", str(tiny.path), "training.steps=7"]) == 0


def test_a_terminal_that_closes_saves(tiny: TinyRun, after_step: Callable[..., None]) -> None:
    """It and its shell send SIGHUP, which counts once; under ``nohup`` it counts for nothing."""
    after_step(3, lambda: [os.kill(os.getpid(), signal.SIGHUP) for _ in range(2)])
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under ``nohup`` themselves
    try:
        assert main(["train", str(tiny.recipe)]) == 130
        assert [path.name for path in RunFolder(tiny.path).all_checkpoints()] == ["step-000002", "step-000003"]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert main(["train", str(tiny.recipe), "training.steps=4"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


HOLDS = """
import sys
from pathlib import Path
from repbend_fast.console import note, say
from repbend_fast.runs.folder import RunFolder, only_writer
with only_writer(RunFolder(sys.argv[1])):
    for _ in range(2000):
        say("a line that nobody reads")
        note("another")
Path(sys.argv[1]).write_text("done")
"""


@pytest.mark.parametrize("reader", ["pipe", *(["disk"] if Path("/dev/full").exists() else [])])
def test_a_reader_that_is_gone_ends_no_run(reader: str, tmp_path: Path) -> None:
    reading, pipe = os.pipe()
    os.close(reading)
    writing = pipe if reader == "pipe" else os.open("/dev/full", os.O_WRONLY)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "end")]
    done = subprocess.run(command, stdout=writing, stderr=writing, env=environment, timeout=120, check=False)
    assert done.returncode == 0
    assert (tmp_path / "end").read_text() == "done"
