"""The tiny models and token batches of ``tests/step`` serve here too, and the one comparison of all gradient tests."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "step"), str(TESTS / "kernels"), str(TESTS.parent / "benchmarks")]
