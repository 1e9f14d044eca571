"""How long ``repbend-fast plan`` takes: each plan in a process of its own, with nothing kept and again with what the
first has kept. ``python -m benchmarks.memory.plan_time`` writes ``benchmarks/results/plan_time.json``.

Seconds are the process's own CPU time, imports included, since they do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import RESULTS, write_json
from repbend_fast.environment import environment

RECORD = RESULTS / "plan_time.json"
PLANS = {
    "demo": ["demo"],
    "demo, budget": ["demo", "memory.budget=4GB"],
    "llama-3.1-8b-instruct, no budget": ["llama-3.1-8b-instruct", "data.sources=demo", "model.device=cpu"],
    "llama-3.1-8b-instruct, qlora, budget of a 4060": [
        *["llama-3.1-8b-instruct", "--with", "qlora", "data.sources=demo", "--card", "4060"],
    ],
}


def seconds(arguments: list[str], cache: str) -> float:
    """CPU seconds of one plan as a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-W", "ignore", "-m", "repbend_fast", "plan", *arguments, "--json"]
    subprocess.run(command, env={**os.environ, "REPBEND_CACHE": cache}, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


def measure(plans: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """By plan: ``first`` with nothing kept, ``again`` with what that has kept."""
    found = {}
    for name, arguments in plans.items():
        with tempfile.TemporaryDirectory() as cache:
            found[name] = {"first": seconds(arguments, cache), "again": seconds(arguments, cache)}
    return found


def main() -> int:
    """Measures, records, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RECORD)
    arguments = parser.parse_args()
    found = measure(PLANS)
    write_json(arguments.results, environment() | {"cpu_seconds": found})
    for name, row in found.items():
        print(f"{name:<50}" + "  ".join(f"{part} {value:5.1f} s" for part, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
