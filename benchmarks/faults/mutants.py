"""Which faults the tests notice: every mutant of ``mutant_list``, one at a time, in a throw-away copy of the checkout.

    python -m benchmarks.faults.mutants [--only TEXT] [--jobs N]

The tests of the chosen mutants are run without any of them first; if one fails then, the rest would mean nothing. A
mutant is

    killed            a test failed (a test that went on past its time limit, or a process that crashed, counts and is
                      named so)
    survived          all its tests passed: a fault that nobody would notice, and exit status 1
    not visible here  it survived, and the list says why it had to
    faulty            its patch does not apply exactly once, or its tests could not be run: exit status 1

A run of the whole list leaves ``results/mutants.json``.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from benchmarks.faults.mutant import Mutant
from benchmarks.faults.mutant_list import MUTANTS
from benchmarks.harness import RESULTS, write_json
from repbend_fast.environment import environment

ROOT = Path(__file__).parents[2]
KILLED, SURVIVED, UNSEEN, FAULTY = "killed", "survived", "not visible here", "faulty"
# Of a mutant's tests: an endless loop ends, a machine that is busy for a while kills nothing.
LEAST_SECONDS, TIMES_BASELINE = 30, 6
BASELINE_SECONDS = 900
# pytest's exit statuses; from 2 on it could not do what it was asked.
ALL_PASSED, TESTS_FAILED = 0, 1

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """Exit status of a test process (None = stopped at its time limit), what it printed, seconds."""

    status: int | None
    output: str
    seconds: float

    @property
    def passed(self) -> int:
        """How many tests passed."""
        found = re.search(r"(\d+) passed", self.output)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant; ``note`` says how or why, in one line."""

    mutant: Mutant
    result: str
    note: str
    seconds: float


class PatchError(Exception):
    """A patch that cannot stand for a fault: not found exactly once, no Python afterwards, or the same program."""


def mutated(text: str, mutant: Mutant) -> str:
    """``text`` of the mutant's file with the fault in it.

    Raises:
        PatchError: see there.
    """
    count = text.count(mutant.old)
    if count != 1:
        raise PatchError(
            f"its text occurs {count} times in {mutant.file}, not once; the code has changed, so must the list"
        )
    changed = text.replace(mutant.old, mutant.new)
    try:
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(text)):
            raise PatchError(f"it leaves {mutant.file} the same program")
    except SyntaxError as error:
        raise PatchError(f"it makes {mutant.file} no Python: {error}") from error
    return changed


@contextmanager
def applied(tree: Path, mutant: Mutant) -> Iterator[None]:
    """The mutant's file changed, and put back."""
    path = tree / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(mutated(before, mutant), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def run_tests(tree: Path, tests: Sequence[str], interpret: bool, limit: float) -> Run:
    """pytest in ``tree`` until the first failure, in a process group of its own that ``limit`` (seconds) ends."""
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # No bytecode: a file that changes within a second and keeps its size would be read as it was.
    environ |= {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")]), "PYTHONDONTWRITEBYTECODE": "1"}
    environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *tests]
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            status = None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return Run(status, output, time.perf_counter() - started)


def examine(tree: Path, mutant: Mutant, limit: float) -> Verdict:
    """Put the mutant into ``tree``, run its tests, and put the file back."""
    try:
        with applied(tree, mutant):
            run = run_tests(tree, mutant.tests, mutant.interpret, limit)
    except (PatchError, OSError) as error:
        return Verdict(mutant, FAULTY, str(error), 0.0)
    return Verdict(mutant, *_judged(run, mutant, limit), run.seconds)


def _judged(run: Run, mutant: Mutant, limit: float) -> tuple[str, str]:
    stale = f"; the list says it could not be seen: {mutant.unseen}" if mutant.unseen else ""
    if run.status is None:
        return KILLED, f"stopped after {limit:.0f} s{stale}"
    if run.status < 0:
        return KILLED, f"crashed with {signal.Signals(-run.status).name}{stale}"
    if run.status == TESTS_FAILED:
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", run.output, re.MULTILINE)
        return KILLED, f"by {found[1] if found else 'a test'}{stale}"
    if run.status == ALL_PASSED:
        return (
            (UNSEEN, mutant.unseen)
            if mutant.unseen
            else (SURVIVED, f"{run.passed} tests passed: {shlex.join(mutant.tests)}")
        )
    return FAULTY, f"pytest ended with {run.status}: {_last_line(run.output)}"


def _last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def copies_of(root: Path, folder: Path, count: int) -> list[Path]:
    """``count`` copies of the checkout's files, those that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    copies = [folder / str(i) for i in range(count)]
    for copy in copies:
        for name in filter(None, listed.stdout.split("\0")):
            if (root / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, copy / name)
    return copies


def each_in_a_tree(
    trees: Sequence[Path], items: Sequence[Item], work: Callable[[Path, Item], Result]
) -> Iterator[Result]:
    """``work`` on every item, each in a tree that no other uses meanwhile; results in the order of the items."""
    free: SimpleQueue[Path] = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def one(item: Item) -> Result:
        tree = free.get()
        try:
            return work(tree, item)
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as pool:
        yield from pool.map(one, items)


Selection = tuple[tuple[str, ...], bool]


def baseline(trees: Sequence[Path], mutants: Sequence[Mutant]) -> tuple[dict[Selection, Run], list[str]]:
    """The mutants' tests on the code as it is, and what is wrong with them, one line each."""
    blind = {(m.tests, m.interpret) for m in mutants if m.unseen}
    selections = list(dict.fromkeys((m.tests, m.interpret) for m in mutants))
    runs: dict[Selection, Run] = {}
    wrong = []
    found = each_in_a_tree(trees, selections, lambda tree, selection: run_tests(tree, *selection, BASELINE_SECONDS))
    for selection, run in zip(selections, found):
        runs[selection] = run
        name = shlex.join(selection[0]) + (" (interpreted)" if selection[1] else "")
        print(f"  {run.seconds:6.1f} s  {run.passed:4} passed  {name}", flush=True)
        if run.status != ALL_PASSED:
            wrong.append(f"{name}: {'no end' if run.status is None else _last_line(run.output)}\n{run.output[-3000:]}")
        elif not run.passed and selection not in blind:
            wrong.append(f"{name}: no test ran, so none can fail")
    return runs, wrong


def imported_from(tree: Path) -> str:
    """Where Python finds the project's packages when tests run in ``tree``."""
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        sys.executable,
        "-c",
        "import repbend_fast, repbend_kernels as k; print(repbend_fast.__file__, k.__file__, sep='\\n')",
    ]
    return subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True, check=True).stdout


def chosen(only: Sequence[str]) -> list[Mutant]:
    """The mutants whose names contain one of ``only``; all of them where it is empty."""
    return [m for m in MUTANTS if not only or any(text in m.name for text in only)]


def write_record(path: Path, verdicts: Sequence[Verdict], seconds: float) -> None:
    """Every verdict under a header with hardware, versions, commit and date."""
    counts = Counter(verdict.result for verdict in verdicts)
    rows = [
        {
            "name": v.mutant.name,
            "file": v.mutant.file,
            "result": v.result,
            "note": v.note,
            "seconds": round(v.seconds, 1),
        }
        for v in verdicts
    ]
    record = {**environment(), "seconds": round(seconds), "counts": dict(sorted(counts.items())), "mutants": rows}
    write_json(path, record)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 where every mutant was killed or could not be seen, 1 where one survived or is faulty, 2 where none
    could be tried.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="mutants whose name contains TEXT; may be repeated"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="so many at a time (default: one per core)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "mutants.json", help="record of a run of the whole list")
    options = parser.parse_args(arguments)
    mutants = chosen(options.only)
    if not mutants:
        print(
            f"error: no mutant's name contains {' or '.join(options.only)}; the names are in benchmarks/faults/",
            file=sys.stderr,
        )
        return 2
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = copies_of(ROOT, Path(folder).resolve(), max(1, min(options.jobs, len(mutants))))
        if imported_from(trees[0]).count(str(trees[0])) != 2:
            print(
                "error: Python finds the project elsewhere than in the copy; mutants would not be run", file=sys.stderr
            )
            return 2
        print("the tests without a mutant:", flush=True)
        runs, wrong = baseline(trees, mutants)
        if wrong:
            print(
                "error: these tests fail without a mutant, so their failing would say nothing:",
                *wrong,
                sep="\n",
                file=sys.stderr,
            )
            return 2
        verdicts = []

        def work(tree: Path, mutant: Mutant) -> Verdict:
            limit = max(LEAST_SECONDS, TIMES_BASELINE * runs[mutant.tests, mutant.interpret].seconds)
            return examine(tree, mutant, limit)

        print(f"{len(mutants)} mutants:", flush=True)
        for verdict in each_in_a_tree(trees, mutants, work):
            verdicts.append(verdict)
            print(
                f"  [{len(verdicts)}/{len(mutants)}] {verdict.result}: {verdict.mutant.name} ({verdict.note})",
                flush=True,
            )
    seconds = time.perf_counter() - started
    counts = Counter(verdict.result for verdict in verdicts)
    print(
        ", ".join(f"{counts[result]} {result}" for result in (KILLED, UNSEEN, SURVIVED, FAULTY)) + f", {seconds:.0f} s"
    )
    if not options.only:
        write_record(options.out, verdicts, seconds)
    return 1 if counts[SURVIVED] or counts[FAULTY] else 0


if __name__ == "__main__":
    sys.exit(main())
