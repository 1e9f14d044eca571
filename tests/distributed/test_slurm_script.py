"""``slurm/train.sbatch`` with stand-ins for Slurm's commands: what it starts, and when it asks to be requeued."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$*" >> "$LOG/requeued"; fi',
    # Every task, one after the other; its exit code is that of the last.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n'
    'for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n "$@"; code=$?; done; exit $code',
    "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS $*" >> "$LOG/started"\n'
    'exit "$CODE"',
}


@pytest.fixture
def submit(tmp_path: Path):
    """``submit(code, *arguments)``: the script's exit code, where every process ends with ``code``."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    def run(code: int, *arguments: str) -> int:
        slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "41007", "SLURM_NTASKS": "2"}
        own = {"SLURM_CPUS_PER_TASK": "4", "LOG": str(tmp_path), "CODE": str(code)}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments], env={**os.environ, **slurm, **own, "PATH": path}, check=False, timeout=60
        )
        return done.returncode

    return run


def test_a_first_start(submit, tmp_path: Path) -> None:
    assert submit(0, "mine.yaml", f"output.folder={tmp_path}/run", "steps=5") == 0
    rest = f"2 node7 21007 4 -m repbend_fast train mine.yaml output.folder={tmp_path}/run steps=5"
    assert (tmp_path / "started").read_text(encoding="utf-8").splitlines() == [f"0 0 {rest}", f"1 1 {rest}"]
    assert not (tmp_path / "requeued").exists()


def test_it_is_requeued_and_goes_on(submit, tmp_path: Path) -> None:
    (tmp_path / "my run" / "checkpoints" / "step-000004").mkdir(parents=True)
    assert submit(130, "mine.yaml", f"output.folder={tmp_path}/my run", "steps=5") == 0
    assert (tmp_path / "requeued").read_text(encoding="utf-8") == "requeue 41007\n"
    started = (tmp_path / "started").read_text(encoding="utf-8").splitlines()
    assert started[0].endswith(f"train --resume {tmp_path}/my run output.folder={tmp_path}/my run steps=5")


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_failure_is_not_requeued(code: int, submit, tmp_path: Path) -> None:
    assert submit(code, "mine.yaml", f"output.folder={tmp_path}/run") == code
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("arguments", [(), ("mine.yaml",), ("output.folder=run",)])
def test_recipe_and_folder_are_asked_for(arguments: tuple[str, ...], submit, tmp_path: Path) -> None:
    assert submit(0, *arguments) == 2
    assert not (tmp_path / "started").exists()
