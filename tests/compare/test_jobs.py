"""Several runs of a comparison at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_comparison import InProcess, TinyComparison

from repbend_fast.cli import main
from repbend_fast.compare import process
from repbend_fast.errors import UserError

# Stands in for Python: says what it got, waits until its partner runs too, and for SIGINT if it is asked to.
CHILD = """#!{python}
import os, signal, sys, time
from pathlib import Path
hit = []
signal.signal(signal.SIGINT, lambda number, frame: hit.append(number))
name, partner, wants = sys.argv[3:6]
here = Path(__file__).parent
(here / name).touch()
until = time.monotonic() + 20
while time.monotonic() < until and not ((here / partner).exists() and (hit or wants == "go")):
    time.sleep(0.02)
print(name, os.environ["OMP_NUM_THREADS"], (here / partner).exists(), *hit, flush=True)
sys.exit(130 if hit else 0)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "python"
    path.write_text(CHILD.format(python=sys.executable), encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    # A suite in the background of a shell inherits an ignored SIGINT, which then stays ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def run(folder: Path, name: str, partner: str, wants: str) -> int:
    return process.run_command([name, partner, wants], folder / f"{name}.log")


def test_two_at_once_share_the_cores_and_come_back_in_order(child: Path) -> None:
    codes = process.run_each(2, lambda names: (names[0], run(child, *names, "go")), [("one", "two"), ("two", "one")])
    assert codes == [("one", 0), ("two", 0)]
    threads = process.threads_per_job(2)
    for name in ("one", "two"):
        assert (child / f"{name}.log").read_text(encoding="utf-8").splitlines()[1:] == [f"{name} {threads} True"]
    assert 1 <= threads <= max(1, (os.cpu_count() or 1) // 2)


def test_ctrl_c_reaches_both_and_begins_nothing_new(child: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until and not ((child / "one").exists() and (child / "two").exists()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    def work(names: tuple[str, str]) -> int:
        begun.append(names[0])
        return run(child, *names, "signal")

    begun: list[str] = []
    previous = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        process.run_each(2, work, [("one", "two"), ("two", "one"), ("three", "one")])
    thread.join()
    assert sorted(begun) == ["one", "two"]
    for name in ("one", "two"):
        assert (child / f"{name}.log").read_text(encoding="utf-8").splitlines()[-1].endswith("True 2")
    assert capsys.readouterr().out.count("the runs save after their steps") == 1
    assert signal.getsignal(signal.SIGINT) == previous


def test_after_an_error_what_runs_ends_and_nothing_begins() -> None:
    begun, ended = [], []
    second_runs = threading.Event()

    def work(item: str) -> None:
        begun.append(item)
        if item == "fails":
            second_runs.wait(10)
            raise UserError("no space")
        second_runs.set()
        time.sleep(0.3)
        ended.append(item)

    with pytest.raises(UserError, match="no space"):
        process.run_each(2, work, ["fails", "slow", "third", "fourth", "fifth"])
    # The worker that failed may have taken one more before the others were cancelled.
    assert begun[:2] in (["fails", "slow"], ["slow", "fails"])
    assert "fifth" not in begun
    assert "slow" in ended


def test_the_result_does_not_depend_on_jobs(
    tiny: TinyComparison, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--rates", "1e-2", "3e-2", "--seeds", "0", "1")
    assert tiny.compare(*options) == 0
    serial = tiny.record
    in_process.take()
    assert tiny.compare(*options, "--jobs", "2") == 0
    assert in_process.take() == []
    together = tiny.record
    assert (serial["settings"].pop("jobs"), together["settings"].pop("jobs")) == (1, 2)
    assert serial == together
    capsys.readouterr()


def test_jobs_below_one(tiny: TinyComparison, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tiny.bend), "--jobs", "0"]) == 2
    assert capsys.readouterr().err == "error: --jobs 0: must be 1 or more\n"
