"""Runs that are killed: forks of one process that has imported everything train, and SIGKILL meets them in a step, in a
validation or while they save.

    python killed_runs.py MODEL WHOLE FOLDER SEED COUNT

prints each kill as JSON. The process that forks has to be one that has computed nothing: autograd and thread pools do
not survive a fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiny_run import TinyRun, adapter_of, reproducible, same_tensors

from repbend_fast.runs.folder import RunFolder
from repbend_fast.runs.stored import Damaged, checked_manifest
from repbend_fast.training import trainer
from repbend_fast.training.validation import Validator

PHASES = ("step", "validation", "save")


@dataclass(frozen=True)
class Kill:
    """``phase``: what the process was in by its own last word. ``finished``, ``kept``: steps that were done, and the
    step of the newest whole checkpoint. ``same``: resumed, the run ended with the bits of an uninterrupted one.
    """

    phase: str
    count: int
    finished: int
    kept: int
    same: bool

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)


def kills(whole: TinyRun, folder: Path, seed: int, count: int) -> Iterator[Kill]:
    """``count`` runs, the phases in turn; when in the phase is drawn from ``seed``.

    ``whole`` is the same run without an interruption.
    """
    arguments = (whole.model, whole.folder, folder, seed, count)
    process = subprocess.Popen([sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout as lines:
        for line in lines:
            if line.startswith("{"):
                yield Kill(**json.loads(line))
    assert process.returncode == 0


def _kills(whole: TinyRun, folder: Path, seed: int, count: int) -> Iterator[Kill]:
    draw = random.Random(seed)
    calm = TinyRun(whole.model, folder / "calm")
    marks = list(_marks(calm.recipe))
    lengths = {phase: statistics.median(s for p, _, s in marks if p == phase) for phase in PHASES}
    times = {phase: sum(p == phase for p, _, _ in marks) for phase in PHASES}
    for number in range(count):
        phase = PHASES[number % len(PHASES)]
        run = TinyRun(whole.model, folder / f"killed-{number}")
        place = draw.randint(1, times[phase])
        seen = _kill(run.recipe, phase, place, draw.uniform(0, lengths[phase]))
        steps = [row["step"] for row in _rows(run) if row.get("type") == "step"]
        newest = [path for path in RunFolder(run.path).all_checkpoints() if _whole(path)]
        kept = int(newest[-1].name[5:]) if newest else 0
        if newest:
            assert run.resume().exit_code == 0
        else:
            assert run.train().exit_code == 0
        same = same_tensors(adapter_of(run.path), adapter_of(whole.path))
        same = same and reproducible(run.path) == reproducible(whole.path) and not list(run.path.rglob(".*"))
        yield Kill(seen, place, max(steps, default=0), kept, same)


def _rows(run: TinyRun) -> list[dict[str, Any]]:
    path = run.path / "metrics.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _whole(path: Path) -> bool:
    try:
        checked_manifest(path)
    except Damaged:
        return False
    return True


def _marks(recipe: Path) -> Iterator[tuple[str, int, float]]:
    """Phase, which of its kind, and seconds, of a run that nobody kills."""
    began: dict[str, float] = {}
    count = dict.fromkeys(PHASES, 0)
    with _training(recipe) as (_, words):
        for word in words:
            phase, what = word.split()
            if what == "begins":
                began[phase], count[phase] = time.perf_counter(), count[phase] + 1
            else:
                yield phase, count[phase], time.perf_counter() - began[phase]


def _kill(recipe: Path, phase: str, place: int, delay: float) -> str:
    """Kill a training ``delay`` seconds after its ``place``-th such phase began; its last word before."""
    with _training(recipe) as (process, words):
        count, last = 0, "step begins"
        for last in words:
            count += last == f"{phase} begins"
            if count == place:
                time.sleep(delay)
                break
        os.kill(process, signal.SIGKILL)
        # What it said while the signal was under way.
        last = [last, *words][-1]
    phase_of, what = last.split()
    return phase_of if what == "begins" else f"after a {phase_of}"


@contextmanager
def _training(recipe: Path) -> Iterator[tuple[int, Iterator[str]]]:
    """A fork that trains, and what it says of its phases."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        _train(recipe, lambda word: os.write(writing, f"{word}\n".encode()))
    os.close(writing)
    with open(reading, encoding="utf-8") as words:
        yield process, (line.strip() for line in words)
    os.waitpid(process, 0)


def _train(recipe: Path, say: Callable[[str], object]) -> None:
    """Never returns."""

    def telling(owner: Any, name: str, phase: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            say(f"{phase} begins")
            result = real(*arguments, **named)
            say(f"{phase} ends")
            return result

        setattr(owner, name, call)

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        telling(trainer.Trainer, "_train_step", "step")
        telling(Validator, "measure", "validation")
        telling(trainer, "save_checkpoint", "save")
        telling(trainer, "save_adapter", "save")
        from repbend_fast.cli import main

        os._exit(main(["train", str(recipe)]))
    finally:
        os._exit(9)


if __name__ == "__main__":
    for each in _kills(
        TinyRun(Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    ):
        print("\n" + json.dumps(each.as_dict()), flush=True)
