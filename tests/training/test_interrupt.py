"""Ctrl-C and SIGTERM on the real process: once saves and says how to go on, twice stops at once, and never
a traceback.
"""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from interruptible import take_interrupts
from tiny_run import TinyRun, adapter_of, reproducible, rows, same_tensors

from repbend_fast.cli import main
from repbend_fast.compare.process import processes
from repbend_fast.console import say, saying
from repbend_fast.training.interrupt import Interrupt

ROOT = Path(__file__).parents[2]
# Steps that wait long enough for a signal to arrive in a known one, in short sleeps: one that came between Python's
# check and the start of a sleep would be seen at the sleep's end.
SLOW_STEPS = """
import sys, time
from repbend_fast.training import trainer
from repbend_fast.cli import main
step = trainer.Trainer._train_step
def slow(self, progress):
    step(self, progress)
    for _ in range(50):
        time.sleep({seconds} / 50)
trainer.Trainer._train_step = slow
sys.exit(main(sys.argv[1:]))
"""


def start(*argv: str, seconds: float = 0.5, code: str | None = None) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", code or SLOW_STEPS.format(seconds=seconds), *argv]
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "40"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        process_group=0,
        preexec_fn=take_interrupts,
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}\n{process.communicate()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_once_saves_and_the_printed_line_goes_on(
    whole: TinyRun, tiny_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    tiny = TinyRun(tiny_model, tmp_path / "with [a] space")
    process = start("train", str(tiny.recipe))
    read_until(process, "step 3/6")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    [event] = [row for row in rows(tiny.path, "event") if row["event"] == "interrupted"]
    assert event["reason"] == {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert "interrupted: saving after this step; press Ctrl-C again to stop at once\n" in out
    [line] = [line for line in out.splitlines() if line.startswith("resume with: ")]
    command = shlex.split(line.removeprefix("resume with: "))
    assert command[0] == "repbend-fast"
    process = start(*command[1:], seconds=0)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "at step 3\n" in out
    assert reproducible(tiny.path) == reproducible(whole.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))


class Interrupting(io.RawIOBase):
    """Takes what is written, and Ctrl-C comes within the first write."""

    def __init__(self) -> None:
        self.taken = b""

    def writable(self) -> bool:
        return True

    def write(self, data: memoryview) -> int:
        first, text = not self.taken, bytes(data)
        self.taken += text
        if first:
            signal.raise_signal(signal.SIGINT)
        return len(text)


@pytest.mark.parametrize("entered", [Interrupt, processes])
def test_a_signal_within_a_write_does_not_write_into_it(entered: Callable[[], AbstractContextManager[object]]) -> None:
    """A line of a step was being written when the signal came, and ended the run: `reentrant call inside
    <_io.BufferedWriter>`.
    """
    raw = Interrupting()
    stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")

    def listener(text: str) -> None:
        stream.write(f"{text}\n")
        stream.flush()

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # which is to stand again behind it
    try:
        with saying(listener), entered():
            say("step 1/6")
    finally:
        signal.signal(signal.SIGINT, previous)
    stream.detach()
    assert [line.partition(":")[0] for line in raw.taken.decode().splitlines()] == ["step 1/6", "interrupted"]


def test_twice_stops_at_once(tiny: TinyRun) -> None:
    process = start("train", str(tiny.recipe), seconds=20)
    read_until(process, "step 1/6")
    process.send_signal(signal.SIGINT)
    read_until(process, "press Ctrl-C again")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert time.monotonic() - started < 10
    assert not list(tiny.path.rglob(".*"))
    assert not (tiny.path / "checkpoints").exists()


def test_killed_between_checkpoints(whole: TinyRun, tiny: TinyRun) -> None:
    process = start("train", str(tiny.recipe), seconds=0.3)
    read_until(process, "step 5/6")
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.communicate()
    with open(tiny.path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"type": "step", "st')
    assert tiny.resume().exit_code == 0
    assert [row["reason"] for row in rows(tiny.path, "event") if row["event"] == "resumed"] == ["step-000004"]
    assert reproducible(tiny.path) == reproducible(whole.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))


WAITING = """
import sys, time
from repbend_fast.training import trainer
from repbend_fast.cli import main
def wait(config):
    print("waiting", flush=True)
    time.sleep(60)
trainer.load_model = wait
sys.exit(main(sys.argv[1:]))
"""


def test_while_loading_it_is_130_without_a_traceback(tiny: TinyRun) -> None:
    process = start("train", str(tiny.recipe), code=WAITING)
    read_until(process, "waiting")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert not tiny.path.exists()


@pytest.mark.parametrize(
    ("place", "resumable"),
    [("repbend_fast.training.trainer.evaluate_sides", False), ("repbend_fast.report.write_report", True)],
    ids=["evaluating", "reporting"],
)
def test_before_and_after_training_it_is_130(
    place: str, resumable: bool, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    assert main(["train", str(tiny.recipe), "output.report=true"]) == 130
    out, err = capsys.readouterr()
    assert err == "interrupted\n"
    assert (f"resume with: repbend-fast train --resume {tiny.path}\n" in out) is resumable
