"""``repbend-fast`` in processes of its own.

Peak resident memory never falls within a process, so each training needs a fresh one. For the same reason this one
loads no model: on Linux a new process starts with the peak of the process that started it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from repbend_fast.runs.folder import saving
from repbend_fast.signals import Handlers
from repbend_fast.training.trainer import INTERRUPTED

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    with out, processes() as running:
        running.raise_if_signalled()  # another job of this comparison may have ended over it
        out.write(f"$ repbend-fast {shlex.join(arguments)}\n")
        out.flush()
        # A process group of its own: a terminal sends Ctrl-C to a whole group, and the training must get it once.
        process = subprocess.Popen(
            [sys.executable, "-m", "repbend_fast.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
            env=running.environment(),
        )
        with running.watching(process):
            code = process.wait()
        running.raise_if_signalled()
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code


def run_each(jobs: int, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``work`` on every item, ``jobs`` at a time; the results in the items' order.

    After an error nothing new is begun, and what runs already runs to its end before the error is raised.
    """
    if jobs == 1:
        return [work(item) for item in items]

    def begin(item: Item) -> Result:
        running.raise_if_signalled()
        return work(item)

    with processes(jobs) as running, ThreadPoolExecutor(jobs) as pool:
        futures: list[Future[Result]] = [pool.submit(begin, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if failed := next((future.exception() for future in futures if future in done and future.exception()), None):
            pool.shutdown(cancel_futures=True)
            raise failed
        return [future.result() for future in futures]


@contextmanager
def processes(jobs: int = 1) -> Iterator[_Processes]:
    """The processes of this comparison. Entered again, from any thread, it is the one that was entered first, in the
    main thread.
    """
    global _entered
    if _entered is not None:
        yield _entered
        return
    with _Processes(jobs) as _entered:
        try:
            yield _entered
        finally:
            _entered = None


class _Processes:
    """While entered, signals that end this process go to its children, which must not train on alone in folders that
    are used again.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.received: int | None = None
        self._running: list[subprocess.Popen[bytes]] = []
        self._handlers = Handlers(self._handle)

    def __enter__(self) -> _Processes:
        self._handlers.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._handlers.__exit__(*exception)

    def environment(self) -> dict[str, str]:
        """A child's. Several at once share the cores, or each would start as many threads as there are."""
        shared = {"OMP_NUM_THREADS": str(threads_per_job(self.jobs))} if self.jobs > 1 else {}
        return shared | os.environ

    @contextmanager
    def watching(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Pass signals on to ``process``, also one that came while it was started."""
        self._running.append(process)
        if self.received is not None:
            process.send_signal(self.received)
        try:
            yield
        finally:
            self._running.remove(process)

    def raise_if_signalled(self) -> None:
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _handle(self, number: int) -> None:
        if number == signal.SIGINT and self.received is None:
            runs = "runs save after their steps" if len(self._running) > 1 else "run saves after its step"
            self._handlers.say(f"interrupted: the {runs}; press Ctrl-C again to stop at once")
        self.received = number
        for process in list(self._running):
            process.send_signal(number)


def threads_per_job(jobs: int) -> int:
    """CPU threads for each of several jobs at once, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


_entered: _Processes | None = None
