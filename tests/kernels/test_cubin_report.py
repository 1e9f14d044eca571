"""Every kernel compiles for GPUs that are not here, without spills, within the limits, and reads 128 bits at a time."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")
from benchmarks.ops import cubin_report

CASES = {(case.name, case.dtype): case for case in cubin_report.all_cases()}
RECORDED = json.loads(cubin_report.RESULT.read_text())["rows"]
# Recompiling all of them takes minutes: here every kernel for one architecture, and the two that a step runs most for
# all.
EVERYWHERE = ("bend_tap_backward", "linear_kl_div")
FRESH = [(name, "bf16", 90) for name, dtype in CASES if dtype == "bf16"]
FRESH += [(name, "bf16", sm) for name in EVERYWHERE for sm in cubin_report.ARCHITECTURES if sm != 90]


def test_the_record_has_every_kernel_dtype_and_architecture() -> None:
    recorded = {(row["kernel"], row["dtype"], row["sm"]) for row in RECORDED}
    assert recorded == {(*key, sm) for key in CASES for sm in cubin_report.ARCHITECTURES}


def test_the_record_is_of_these_kernels() -> None:
    stale = {
        (r["kernel"], r["dtype"])
        for r in RECORDED
        if r["digest"] != cubin_report.digest(CASES[r["kernel"], r["dtype"]])
    }
    assert not stale, f"run python -m benchmarks.ops.cubin_report; changed since: {sorted(stale)}"


def test_the_record_keeps_the_limits() -> None:
    for row in RECORDED:
        assert not cubin_report.over_limit(row), row
        assert row["spill_bytes"] == 0, row
        assert row["loads_128bit"] > 0, row


@pytest.mark.parametrize(("name", "dtype", "sm"), FRESH)
def test_compiles_as_recorded(name: str, dtype: str, sm: int) -> None:
    fresh = cubin_report.row(CASES[name, dtype], sm)
    assert not cubin_report.over_limit(fresh), fresh
    assert int(str(fresh["loads_128bit"])) > 0


def test_a_kernel_over_the_limits_is_noticed() -> None:
    row = {"registers": 255, "shared_bytes": 0, "spill_bytes": 16}
    assert cubin_report.over_limit(row) == ["registers 255 > 128", "spill_bytes 16 > 0"]
