"""Pieces of the op benchmarks that are no fixtures: a contender's work, the machine's rates, and the
record's header.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from repbend_fast.environment import environment

RESULTS = Path(__file__).parent / "results"


def write_json(path: Path, record: object) -> None:
    """Writes a record, and the folder it stands in if there is none: a long run is not lost to a missing folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


Result = tuple[Tensor, list[Tensor]]
"""A value and its gradients."""
Call = Callable[[], Result]


@dataclass
class Work:
    """One contender on one case: ``calls`` do forward and backward on input sets of their own and return (value,
    gradients).
    """

    op: str
    case: str
    contender: str
    calls: list[Call]
    exact: Result
    tolerance: float
    bytes_moved: int = 0
    flops: int = 0


Measure = Callable[[Work], dict[str, object]]
"""Checks, measures and records one contender; the fixture ``measured``."""


class Timing(Protocol):
    """What pytest-benchmark knows of a row, in seconds."""

    median: float
    iqr: float
    rounds: int


@dataclass
class Machine:
    """What this machine does at best: copied bytes per second (read and written), matrix FLOP per second."""

    copy: float
    matrix: float


def median_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(stats: Timing, work: Work, machine: Machine, calls: int) -> dict[str, object]:
    """A row's time per call of rounds of ``calls``, and what share of the machine's own rates it reaches."""
    seconds = stats.median / calls
    found: dict[str, object] = {
        "median_ms": round(seconds * 1e3, 4),
        "iqr_ms": round(stats.iqr / calls * 1e3, 4),
        "rounds": stats.rounds,
    }
    if work.bytes_moved:
        found |= {
            "gb_per_s": round(work.bytes_moved / seconds / 1e9, 2),
            "percent_of_copy": round(100 * work.bytes_moved / seconds / machine.copy, 1),
        }
    if work.flops:
        found |= {
            "tflop_per_s": round(work.flops / seconds / 1e12, 3),
            "percent_of_gemm": round(100 * work.flops / seconds / machine.matrix, 1),
        }
    return found


def hardware_slug() -> str:
    """A file name from the hardware's name; every CPU is ``cpu``, so that the record of a CPU has one place."""
    return (
        re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        if torch.cuda.is_available()
        else "cpu"
    )


def merged(
    kept: list[dict[str, object]],
    fresh: list[dict[str, object]],
    header: dict[str, object],
    key: Callable[[dict[str, object]], object],
) -> list[dict[str, object]]:
    """``fresh``, stamped with the header's commit and date, in the place of the rows of ``kept`` that have a ``key`` of
    theirs.
    """
    replaced = {key(row) for row in fresh}
    stamped = [row | {"commit": header["commit"], "date": header["date"]} for row in fresh]
    return [row for row in kept if key(row) not in replaced] + stamped


def write_record(path: Path, rows: list[dict[str, object]], machine: Machine, *, whole: bool) -> None:
    """Writes the rows under a header, in the place of all rows of their ops or, if the run is not ``whole``, of the
    same contenders.

    Rows of ops that this run left out stay as they were.
    """

    def key(row: dict[str, object]) -> tuple[object, ...]:
        return (row["op"],) if whole else (row["op"], row["case"], row["contender"])

    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    record = {
        **environment(),
        "copy_gb_per_s": round(machine.copy / 1e9, 2),
        "gemm_tflop_per_s": round(machine.matrix / 1e12, 3),
    }
    record["rows"] = sorted(merged(kept, rows, record, key), key=lambda r: (r["op"], r["case"]))
    write_json(path, record)
