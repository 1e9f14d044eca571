"""Run the demo recipe for several seeds and record what it does: ``benchmarks/results/demo.json``.

    python -m benchmarks.demo.train_demo --seeds 42 1 2 [--processes 2] [key=value …]

Each seed is one ``repbend-fast train demo`` in processes of its own; ``seconds`` is their wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TypedDict

from benchmarks.demo.demo_record import Row
from benchmarks.harness import RESULTS, write_json
from repbend_fast.environment import environment
from repbend_fast.evaluation.rates import KEYS

RESULT = RESULTS / "demo.json"


class Spent(TypedDict):
    """Of one command, all of its processes together."""

    seconds: float
    processor_seconds: float


def timed(arguments: list[str], cwd: Path, processes: int = 1) -> Spent:
    """Runs one command of the command line in ``cwd``, in so many processes that share the cores."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environ, launcher = dict(os.environ), ["-m", "repbend_fast"]
    if processes > 1:
        environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *launcher]
    subprocess.run([sys.executable, *launcher, *arguments], check=True, cwd=cwd, env=environ)
    after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    processor = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"seconds": round(ended - started, 1), "processor_seconds": round(processor, 1)}


def run_seed(seed: int, folder: Path, overrides: list[str], processes: int = 1, recipe: str = "demo") -> Row:
    """One demo run; its two evaluations by key, the step that was kept and the run's seconds."""
    training = ["train", recipe, f"training.seed={seed}", f"output.folder={folder.resolve()}", *overrides]
    return entry(seed, folder, timed(training, Path.cwd(), processes)["seconds"])


def entry(seed: int, folder: Path, seconds: float) -> Row:
    """A finished run's line of the record, without what was not measured."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    sides = {
        side: {key: evaluation[side][key] for key in KEYS if key in evaluation[side]} for side in ("before", "after")
    }
    counts = evaluation["after"]["counts"]
    return {"seed": seed, **sides, "seconds": round(seconds, 1), "best_step": evaluation["best_step"], "counts": counts}


def _seeds(out: Path, made: dict[str, object], found: Row) -> list[Row]:
    """``found`` with what the record holds of the same commit, processes and settings, in the order of the runs; a seed
    that was run again keeps its place.
    """
    record = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    same = all(record.get(name) == made[name] for name in ("commit", "processes", "overrides"))
    held = {each["seed"]: each for each in record["seeds"]} if same else {}
    return list((held | {found["seed"]: found}).values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/record-demo"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--processes", type=int, default=1, help="that train together, as torchrun starts them")
    parser.add_argument("overrides", nargs="*", help="key=value, as for `repbend-fast train`")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        found = run_seed(seed, arguments.folder / f"seed-{seed}", arguments.overrides, arguments.processes)
        made = {**environment(), "processes": arguments.processes, "overrides": arguments.overrides}
        write_json(arguments.out, {**made, "seeds": _seeds(arguments.out, made, found)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
