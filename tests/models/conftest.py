"""The tiny models of ``tests/step``, the comparison of ``tests/kernels`` and the measure of ``benchmarks`` serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("tests/step", "tests/kernels", "benchmarks"):
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))
