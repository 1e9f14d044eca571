"""Runs the kernel tests once more with every Triton kernel interpreted on the CPU.

Triton decides at import whether kernels are interpreted, so this takes a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton", reason="the kernels need Triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the same tests run the compiled kernels")
def test_every_kernel_through_the_interpreter() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "tests/kernels",
            "-q",
            "-k",
            "triton",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::RuntimeWarning",
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout[-2000:]
    assert int(passed[1]) > 300, result.stdout[-2000:]
