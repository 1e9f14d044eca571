"""Bad input for every parser: ``python -m benchmarks.faults.fuzz --cases 100000``.

A case is drawn from its seed alone, so that a number is enough to have it again. What fails is kept in ``corpus/`` as
it is, and is the first thing that is run from then on. A fault is anything but ``UserError``: another error, a case
that computes for longer than ``LONGEST`` seconds or waits for longer than ``WAITED``, rows that are dropped without a
word, a file opened for writing outside of the case's own folder.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from benchmarks.faults.fuzz_draws import Files
from benchmarks.faults.fuzz_targets import TARGETS
from benchmarks.harness import RESULTS, write_json
from repbend_fast.console import saying
from repbend_fast.environment import environment
from repbend_fast.errors import UserError

CORPUS = Path(__file__).parent / "corpus"
RECORD = RESULTS / "fuzz.json"
LONGEST = 10.0
"""Processor time, which other work on the machine does not lengthen."""
WAITED = 600.0
MEMORY = Path("/dev/shm")
"""Where cases are written if it is there: no disk is waited for."""
IMPORTED = ("repbend_fast.verify.parity", "repbend_fast.exports.low_rank", "repbend_fast.evaluation.judges.endpoint")
"""Before the first case, whose time would be theirs."""
MOST_FAULTS = 5
"""Of one parser: they tend to be of one kind."""


@dataclass
class Count:
    """Of one parser: cases that were read, and that were refused in one line."""

    cases: int = 0
    read: int = 0
    refused: int = 0
    seconds: float = 0.0

    def on(self, before: Count) -> Count:
        """Both together."""
        return Count(*(mine + earlier for mine, earlier in zip(asdict(self).values(), asdict(before).values())))


class TooLong(Exception):
    """A case took longer than ``LONGEST`` or ``WAITED``."""


@dataclass
class _Watch:
    """What the audit hook looks at: it cannot be taken away again."""

    inside: Path | None = None
    elsewhere: str | None = None


_watch = _Watch()


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _watch.inside is None or event not in ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree"):
        return
    path = arguments[0]
    writes = event != "open" or (
        isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if writes and isinstance(path, str | bytes) and not os.fsdecode(path).startswith((str(_watch.inside), "/dev/")):
        _watch.elsewhere = _watch.elsewhere or f"{event} {os.fsdecode(path)}"


def _alarm(number: int, frame: FrameType | None) -> None:
    computed = number == signal.SIGPROF
    raise TooLong(f"{'computes' if computed else 'waits'} for more than {LONGEST if computed else WAITED:g} s")


def _limit(computed: float, waited: float) -> None:
    """0 = none."""
    signal.setitimer(signal.ITIMER_PROF, computed)
    signal.setitimer(signal.ITIMER_REAL, waited)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Cases may run inside: the alarm is set up, and warnings and output of the libraries are put away."""
    if not getattr(watched, "hooked", False):
        sys.addaudithook(_audit)
        watched.hooked = True  # type: ignore[attr-defined]
    before = {number: signal.signal(number, _alarm) for number in (signal.SIGALRM, signal.SIGPROF)}
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), saying(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        _limit(0, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def run_case(name: str, files: Files, folder: Path) -> bool:
    """Whether the parser read the case; False where it refused it in one line.

    Raises:
        Exception: a fault.
    """
    _empty(folder)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    _watch.inside, _watch.elsewhere = folder, None
    _limit(LONGEST, WAITED)
    try:
        TARGETS[name].run(folder, files)
    except UserError as error:
        if not str(error).strip():
            raise ValueError("an error without a word") from error
        return False
    finally:
        _limit(0, 0)
        _watch.inside = None
        if _watch.elsewhere is not None:
            raise ValueError(f"written outside of its folder: {_watch.elsewhere}")
    return True


def _empty(folder: Path) -> None:
    """Folders stay where they can: removing one takes longer than most cases do."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def drawn(name: str, seed: int) -> Files:
    """The case of that number."""
    return TARGETS[name].make(random.Random(f"{name} {seed}"))


def kept_cases(name: str) -> Iterator[tuple[str, Files]]:
    """What failed before, by file."""
    for path in sorted(CORPUS.glob(f"{name}-*.json")):
        files = json.loads(path.read_text(encoding="utf-8"))
        yield path.name, {file: base64.b64decode(data) for file, data in files.items()}


def keep(name: str, seed: int, files: Files) -> Path:
    """Put a case into the corpus."""
    path = CORPUS / f"{name}-{seed}.json"
    encoded = {file: base64.b64encode(data).decode() for file, data in files.items()}
    write_json(path, encoded)
    return path


def fuzz(name: str, seeds: Iterable[int], folder: Path, seconds: float | None = None) -> tuple[Count, list[int]]:
    """Run cases; returns the seeds of those with a fault, which are kept and printed."""
    count, faults = Count(), list[int]()
    for module in IMPORTED:
        importlib.import_module(module)
    drawn(name, 0)
    began = time.perf_counter()
    with watched():
        for seed in seeds:
            if seconds is not None and time.perf_counter() - began > seconds:
                break
            count.cases += 1
            files = drawn(name, seed)
            try:
                read = run_case(name, files, folder)
                count.read += read
                count.refused += not read
            except Exception:
                faults.append(seed)
                told = traceback.format_exc().encode("utf-8", "backslashreplace").decode()
                print(f"{name} {seed}: {keep(name, seed, files)}\n{told}", flush=True)
                if len(faults) == MOST_FAULTS:
                    break
    count.seconds = round(time.perf_counter() - began, 1)
    return count, faults


def main() -> int:
    """Exit code 1 where a case has a fault; only without one, and over all parsers, is a record written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="of each parser")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, help="at most, for each parser")
    parser.add_argument("--more", action="store_true", help="go on after the recorded cases")
    parser.add_argument("--only", choices=TARGETS, action="append", help="this parser alone; repeatable")
    arguments = parser.parse_args()
    before = json.loads(RECORD.read_text(encoding="utf-8"))["parsers"] if RECORD.exists() else {}
    found: dict[str, object] = {}
    bad = False
    with tempfile.TemporaryDirectory(prefix="repbend-fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
        for name in arguments.only or TARGETS:
            done = Count(**before[name]) if arguments.more and name in before else Count()
            seeds = range(arguments.first + done.cases, arguments.first + arguments.cases)
            count, faults = fuzz(name, seeds, Path(folder) / "case", arguments.seconds)
            bad = bad or bool(faults)
            found[name] = asdict(count.on(done))
            print(name, found[name], flush=True)
    if not bad:
        parsers = (before if arguments.only else {}) | found
        whole = {name: parsers[name] for name in TARGETS if name in parsers}
        record = {**environment(), "first_case": arguments.first, "parsers": whole}
        write_json(RECORD, record)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
