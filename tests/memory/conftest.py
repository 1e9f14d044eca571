"""The benchmarks' measuring is importable, and so are the tiny models of the step's tests."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "step"), str(TESTS.parent / "benchmarks")]
