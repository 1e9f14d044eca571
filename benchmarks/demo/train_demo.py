"""Run the demo recipe for several seeds and record what it does: ``benchmarks/results/demo.json``.

    python -m benchmarks.demo.train_demo --seeds 42 1 2 [key=value …]

Each seed is one ``repbend-fast train demo`` in a process of its own; ``seconds`` is that process's wall time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.demo.demo_record import Row
from repbend_fast.environment import environment
from repbend_fast.evaluation.rates import KEYS

RESULT = Path(__file__).parents[1] / "results" / "demo.json"


def run_seed(seed: int, folder: Path, overrides: list[str]) -> Row:
    """One demo run; its two evaluations by key, the step that was kept and the run's seconds."""
    started = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "repbend_fast.cli",
        "train",
        "demo",
        f"training.seed={seed}",
        f"output.folder={folder}",
        *overrides,
    ]
    subprocess.run(command, check=True)
    return entry(seed, folder, time.perf_counter() - started)


def entry(seed: int, folder: Path, seconds: float) -> Row:
    """A finished run's line of the record, without what was not measured."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    sides = {
        side: {key: evaluation[side][key] for key in KEYS if key in evaluation[side]} for side in ("before", "after")
    }
    counts = evaluation["after"]["counts"]
    return {"seed": seed, **sides, "seconds": round(seconds, 1), "best_step": evaluation["best_step"], "counts": counts}


def _others(out: Path, commit: object, overrides: list[str], seed: int) -> list[Row]:
    """What the record holds of the same commit and settings for other seeds."""
    record = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    same = record.get("commit") == commit and record.get("overrides") == overrides
    return [each for each in record["seeds"] if each["seed"] != seed] if same else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/record-demo"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help="key=value, as for `repbend-fast train`")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        found = run_seed(seed, arguments.folder / f"seed-{seed}", arguments.overrides)
        where = environment()
        seeds = sorted(
            [*_others(arguments.out, where["commit"], arguments.overrides, seed), found], key=lambda each: each["seed"]
        )
        record = {**where, "overrides": arguments.overrides, "seeds": seeds}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
