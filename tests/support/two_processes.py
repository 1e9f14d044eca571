"""Two processes that train together, for tests: forked from one interpreter behind its imports.

    python -m two_processes FOLDER PORT

Each does what ``tasks_of_two.everything`` says and leaves the result in ``FOLDER/NUMBER.pt``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PATHS = (ROOT, ROOT / "kernels", ROOT / "tests" / "support", ROOT / "examples")


def environment(*more: Path) -> dict[str, str]:
    """That of a new interpreter: one thread each, and the tests' own modules."""
    paths = os.pathsep.join(map(str, (*PATHS, *more)))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def torchrun(*words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """``words`` in two processes as torchrun starts them; modules in ``cwd`` can be imported."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    env = environment(*([cwd] if cwd else [])) | variables
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False, env=env)


def in_two(folder: Path, timeout: float = 600) -> list[dict[str, Any]]:
    """What each process found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "two_processes", str(folder), str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment())
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2)]


def _process(folder: Path, port: str, number: int) -> int:
    from tasks_of_two import everything

    # As torchrun sets them.
    own = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ.update(own, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    try:
        torch.save(everything(folder), folder / f"{number}.pt")
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(folder: Path, port: str) -> int:
    """Fork both, wait for both: 0 if both are done."""
    import tasks_of_two  # noqa: F401  # imports what both need, once

    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _process(folder, port, number)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
