"""What a launcher says of the processes that it started. torchrun, accelerate and ``slurm/train.sbatch`` set the same
variables.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from repbend_fast.errors import UserError


@dataclass(frozen=True)
class Launch:
    """This process is ``number`` (from 0) of ``count``, and ``local`` among those of its machine."""

    number: int = 0
    count: int = 1
    local: int = 0


def launch() -> Launch:
    """As ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` say; alone where the first two are not both set.

    Raises:
        UserError: one of them is no number, or they do not fit each other.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Launch()
    number, count = _read("RANK"), _read("WORLD_SIZE")
    if number >= max(1, count):
        raise UserError(f"RANK={number} with WORLD_SIZE={count}: start the processes by torchrun, or unset both")
    return Launch(number, count, _read("LOCAL_RANK") if "LOCAL_RANK" in os.environ else number)


def _read(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise UserError(f"{name}={text}: must be a number; start the processes by torchrun, or unset it")
    return int(text)
