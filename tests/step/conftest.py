"""The helpers of this folder, the one comparison of all gradient tests, and the benchmarks' baselines are importable from every test."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "kernels"), str(ROOT / "benchmarks")]
