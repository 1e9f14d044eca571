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
from pathlib import Path

from benchmarks.harness import write_json
from repbend_fast.environment import commit, environment

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "faults.json"
KILLS = 30
KILLED = "test_random_kills.py"
TESTS = {
    KILLED: "killed at random moments",
    "test_checkpoints.py": "killed in each phase of a save, disk full, torn or altered checkpoints",
    "test_saving.py": "disk full, read-only folder",
    "test_interrupt.py": "interrupted",
    "test_changing_world.py": "data that change or vanish, clock going back, two runs in one folder",
    "test_not_finite.py": "a loss that is not finite",
    "test_resume.py": "resumed",
}


def main() -> int:
    """Returns the exit code of the tests. What passes is recorded file by file; a file with a failure loses its row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(TESTS), help="this file; repeatable")
    chosen = parser.parse_args().only or list(TESTS)
    failed = 0
    for name in chosen:
        code, found = _run(name)
        failed = failed or code
        _note(name, found)
    print(RECORD.relative_to(ROOT))
    return failed


def _run(name: str) -> tuple[int, dict[str, object]]:
    """Exit code of the tests of one file, and its part of the record; empty where one failed."""
    with tempfile.TemporaryDirectory() as folder:
        kills, results = Path(folder) / "kills.json", Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", f"tests/training/{name}"]
        done = subprocess.run(
            # A limit of one test is nothing for 30 kills.
            [*command, "--timeout=0"],
            cwd=ROOT,
            env={**os.environ, "KILLS": str(KILLS), "KILLS_RECORD": str(kills)},
        )
        if done.returncode:
            return done.returncode, {}
        cases = list(ET.parse(results).getroot().iter("testcase"))
        skipped = sum(case.find("skipped") is not None for case in cases)
        found: dict[str, object] = {
            "what": TESTS[name],
            "commit": commit(),
            "passed": len(cases) - skipped,
            "skipped": skipped,
        }
        if name == KILLED:
            found |= _killed(json.loads(kills.read_text(encoding="utf-8")))
    return 0, found


def _killed(kills: list[dict[str, object]]) -> dict[str, object]:
    lost = [int(str(kill["finished"])) - int(str(kill["kept"])) for kill in kills]
    return {
        "kills": kills,
        "resumed_to_the_same_bits": sum(kill["same"] is True for kill in kills),
        "most_steps_lost": max(lost),
    }


def _note(name: str, found: dict[str, object]) -> None:
    """Put one file's part into the record."""
    tests = json.loads(RECORD.read_text(encoding="utf-8"))["tests"] if RECORD.exists() else {}
    tests.pop(name, None)
    if found:
        tests[name] = found
    record = {**environment(), "tests": {each: tests[each] for each in TESTS if each in tests}}
    write_json(RECORD, record)


if __name__ == "__main__":
    sys.exit(main())
