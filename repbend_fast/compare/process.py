"""``repbend-fast`` in a process of its own.

Peak resident memory never falls within a process, so each training needs a fresh one. For the same reason this one loads no model: on
Linux a new process starts with the peak of the process that started it.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from repbend_fast.metrics import say
from repbend_fast.runs import saving
from repbend_fast.trainer import INTERRUPTED


def run_command(arguments: Sequence[str], log: Path) -> int:
    """Run ``repbend-fast`` with ``arguments``, append what it prints to ``log``, and return its exit code.

    Ctrl-C is passed on, so that a training saves and stops by itself; a second one stops it at once.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when the process has ended.
        SystemExit: after SIGTERM or SIGHUP, when the process has ended.
    """
    with saving("the log", log):
        log.parent.mkdir(parents=True, exist_ok=True)
        out = open(log, "a", encoding="utf-8")  # noqa: SIM115 - closed below
    with out, _PassedOn() as signals:
        out.write(f"$ repbend-fast {shlex.join(arguments)}\n")
        out.flush()
        # A process group of its own: a terminal sends Ctrl-C to a whole group, and the training must get it once.
        signals.process = subprocess.Popen(
            [sys.executable, "-m", "repbend_fast.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        code = signals.process.wait()
    if signals.received in (signal.SIGTERM, signal.SIGHUP):
        raise SystemExit(128 + signals.received)
    if signals.received is not None or code == INTERRUPTED:
        raise KeyboardInterrupt
    return code


class _PassedOn:
    """While entered, signals that end this process go to the child, which must not train on alone in a folder that is used again."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _PassedOn:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Under nohup a SIGHUP stays ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.received is None:
            say("interrupted: the run saves after its step; press Ctrl-C again to stop it at once")
        self.received = number
        if self.process is not None:
            self.process.send_signal(number)
