"""Every kernel under NVIDIA's compute-sanitizer: no access outside of a tensor, no race, no unwritten memory read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from every_kernel import kernels

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "support" / "every_kernel.py"
SANITIZER = shutil.which("compute-sanitizer")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
pytest.importorskip("triton", reason="the kernels need Triton")


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        command, env={**env, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=380
    )


def blocks_of(output: str) -> list[str]:
    """The sanitizer's reports, one string each: lines that begin with its mark, an error's first line being the only
    unindented one.
    """
    lines = [line.removeprefix("========= ") for line in output.splitlines() if line.startswith("========= ")]
    blocks: list[str] = []
    for line in lines:
        if line.startswith(" ") and blocks:
            blocks[-1] += "\n" + line
        else:
            blocks.append(line)
    return blocks


# Of ``place`` only the entries of selected rows are ever written, and ``rows[place[n]] == n`` tells which those are.
READS_UNWRITTEN = {"initcheck": {"add_rows_kernel"}}


def ours(output: str, tool: str = "memcheck") -> list[str]:
    """The reports that name one of this package's kernels."""
    names = "|".join(set(kernels()) - READS_UNWRITTEN.get(tool, set()))
    return [block for block in blocks_of(output) if re.search(rf"\b({names})\b", block)]


def test_the_program_launches_every_kernel() -> None:
    """Interpreted here; a kernel that is added must be launched there too."""
    result = run([sys.executable, str(PROGRAM)], TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(re.findall(r"^launched (\w+)$", result.stdout, re.MULTILINE)) == set(kernels()), result.stdout
    assert "not launched" not in result.stdout


def test_only_reports_about_our_kernels_count() -> None:
    other = "========= Invalid __global__ read of size 4 bytes\n=========     at elementwise_kernel+0x10\n"
    mine = (
        "========= Invalid __global__ write of size 2 bytes\n=========     at add_rows_kernel+0x5d0\n=========     "
        "by thread (1,0,0)\n"
    )
    output = f"text\n{other}{mine}========= ERROR SUMMARY: 2 errors\n"
    (found,) = ours(output)
    assert found.startswith("Invalid __global__ write")
    assert ours(output, "initcheck") == []
    assert len(ours(output.replace("add_rows", "row_distance"), "initcheck")) == 1


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on the PATH")
@pytest.mark.parametrize("tool", TOOLS)
def test_kernels_are_clean(tool: str) -> None:
    """Without torch's caching allocator, so that the end of a tensor is the end of an allocation."""
    assert SANITIZER is not None
    result = run([SANITIZER, "--tool", tool, sys.executable, str(PROGRAM)], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    output = result.stdout + result.stderr
    assert set(re.findall(r"^launched (\w+)$", output, re.MULTILINE)) == set(kernels()), output[-3000:]
    assert "SUMMARY" in output, output[-3000:]
    assert not ours(output, tool), "\n\n".join(ours(output, tool))[:6000]
