"""What a run survives, recorded: ``python -m benchmarks.faults.fault_record`` runs the tests of faults with 30 random
kills and writes ``benchmarks/results/faults.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from repbend_fast.environment import environment

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "faults.json"
KILLS = 30
KILLED = "test_random_kills.py"
TESTS = {
    "killed at random moments": KILLED,
    "killed in each phase of a save, disk full, torn or altered checkpoints": "test_checkpoints.py",
    "disk full, read-only folder": "test_saving.py",
    "interrupted": "test_interrupt.py",
    "data that change or vanish, clock going back, two runs in one folder": "test_changing_world.py",
    "a loss that is not finite": "test_not_finite.py",
    "resumed": "test_resume.py",
}


def main() -> int:
    """Returns the exit code of the tests; nothing is recorded where one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(TESTS.values()), help="this file; repeatable")
    chosen = {what: name for what, name in TESTS.items() if name in (parser.parse_args().only or TESTS.values())}
    with tempfile.TemporaryDirectory() as folder:
        kills, results = Path(folder) / "kills.json", Path(folder) / "results.xml"
        files = [f"tests/training/{name}" for name in {KILLED, *chosen.values()}]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", *files],
            cwd=ROOT,
            env={**os.environ, "KILLS": str(KILLS), "KILLS_RECORD": str(kills)},
        )
        if done.returncode:
            return done.returncode
        RECORD.write_text(json.dumps(_record(kills, results, chosen), indent=1) + "\n", encoding="utf-8")
    print(RECORD.relative_to(ROOT))
    return 0


def _record(kills: Path, results: Path, tests: Mapping[str, str]) -> dict[str, object]:
    found = json.loads(kills.read_text(encoding="utf-8"))
    passed: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for case in ET.parse(results).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}.py"
        (skipped if case.find("skipped") is not None else passed)[name] += 1
    return {
        **environment(),
        "kills": found,
        "kills_resumed_to_the_same_bits": sum(kill["same"] for kill in found),
        "most_steps_lost": max(kill["finished"] - kill["kept"] for kill in found),
        "tests": {what: {"passed": passed[name], "skipped": skipped[name]} for what, name in tests.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
