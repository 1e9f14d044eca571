"""What the record of the op benchmarks holds, as types."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict


class OpRow(TypedDict):
    """One contender on one case."""

    op: str
    case: str
    contender: str
    error_value: float
    error_gradient: float
    peak_bytes: int
    returned_bytes: int
    median_ms: float
    iqr_ms: float
    rounds: int
    gb_per_s: NotRequired[float]
    percent_of_copy: NotRequired[float]
    tflop_per_s: NotRequired[float]
    percent_of_gemm: NotRequired[float]


class OpRecord(TypedDict):
    """All rows, and what they were measured on."""

    hardware: str
    device: str
    threads: int
    versions: dict[str, str]
    commit: str
    date: str
    copy_gb_per_s: float
    gemm_tflop_per_s: float
    rows: list[OpRow]


Cost = Literal["median_ms", "peak_bytes"]
COSTS: tuple[Cost, Cost] = ("median_ms", "peak_bytes")
"""What a contender is to need less of."""
