"""Signals between the comparison and its processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from repbend_fast.compare import process

# Stands in for the Python that runs a training: saves on the first SIGINT, a little later than it comes.
CHILD = """#!{python}
import os, signal, sys, time
count = 0
def handle(number, frame):
    global count
    count += 1
    print("interrupt", count, flush=True)
signal.signal(signal.SIGINT, handle)
print("ready", os.getpgrp(), *sys.argv[3:], flush=True)
until = time.monotonic() + 20
while not count and time.monotonic() < until:
    time.sleep(0.02)
time.sleep(0.2)
print("saved", flush=True)
sys.exit({code})
"""


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A suite in the background of a shell inherits an ignored SIGINT, which then stays ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def child(_interruptible: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def write(code: int) -> None:
        path = tmp_path / "python"
        path.write_text(CHILD.format(python=sys.executable, code=code), encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setattr(process.sys, "executable", str(path))

    write(130)
    return tmp_path / "log" / "run.log"


def signal_when_ready(log: Path, *numbers: int) -> threading.Thread:
    """Send signals to this process once the child is ready."""

    def wait() -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until and not (log.is_file() and "ready" in log.read_text(encoding="utf-8")):
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ctrl_c_reaches_the_run_once_and_is_raised_when_it_has_saved(
    child: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    previous = signal.getsignal(signal.SIGINT)
    thread = signal_when_ready(child, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        process.run_command(["train", "a b.yaml"], child)
    thread.join()
    typed, ready, *rest = child.read_text(encoding="utf-8").splitlines()
    assert (typed, rest) == ("$ repbend-fast train 'a b.yaml'", ["interrupt 1", "saved"])
    assert ready.split()[2:] == ["train", "a", "b.yaml"]
    # A terminal's Ctrl-C goes to the whole group of this process, and must not reach the run a second time.
    assert int(ready.split()[1]) != os.getpgrp()
    assert capsys.readouterr().out.count("press Ctrl-C again") == 1
    assert signal.getsignal(signal.SIGINT) == previous


def test_a_second_ctrl_c_is_passed_on_too(child: Path) -> None:
    thread = signal_when_ready(child, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        process.run_command(["train"], child)
    thread.join()
    assert "interrupt 2" in child.read_text(encoding="utf-8")


def test_a_killed_comparison_takes_its_run_with_it(child: Path) -> None:
    thread = signal_when_ready(child, signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        process.run_command(["train"], child)
    thread.join()
    assert caught.value.code == 128 + signal.SIGTERM
    assert "saved" not in child.read_text(encoding="utf-8")


def test_exit_codes_come_back_and_logs_are_appended_to(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "run.log"
    assert process.run_command(["recipes", "show", "none"], log) == 2
    assert process.run_command(["recipes", "show", "demo-rmu"], log) == 0
    text = log.read_text(encoding="utf-8")
    assert "error: no recipe is called none" in text
    assert (
        text.index("$ repbend-fast recipes show none")
        < text.index("$ repbend-fast recipes show demo-rmu")
        < text.index("objective:")
    )
