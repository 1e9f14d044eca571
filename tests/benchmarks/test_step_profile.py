"""The profile of a step: every slice of time lands in its part and kind, and nothing of a step is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from benchmarks.step import step_profile
from benchmarks.step.profile_parts import OTHER, OUTSIDE, Ranges, Slice, accounted, add_up, busy_seconds, kind_of, read
from repbend_fast import ranges

ROOT = Path(__file__).parents[2]
MARKED = Ranges(
    [
        (ranges.REFERENCE, 0.0, 10.0),
        (ranges.ADAPTED, 10.0, 20.0),
        (ranges.CHECKPOINTED, 12.0, 14.0),
        (ranges.BACKWARD, 20.0, 40.0),
        (ranges.CHECKPOINTED, 30.0, 34.0),
        (ranges.REFERENCE, 40.0, 50.0),
        ("Optimizer.step#", 60.0, 70.0),
    ]
)


@pytest.mark.parametrize(
    ("time", "part"),
    [
        (5.0, "reference pass"),
        (13.0, "adapted pass"),
        (25.0, "backward"),
        (31.0, "recomputed blocks"),
        (36.0, "backward"),
        (45.0, "reference pass"),
        (55.0, OUTSIDE),
        (65.0, "optimizer"),
    ],
)
def test_a_time_lies_in_one_part(time: float, part: str) -> None:
    assert MARKED.part(time) == part


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("repbend_kernels::low_rank_down", "aten::mm"), "LoRA"),
        (("repbend_kernels::low_rank_down", "repbend_kernels::keyed_dropout"), "LoRA"),
        (("repbend_kernels::linear_kl_div", "aten::mm", "sm90_gemm"), "head"),
        (("repbend_kernels::bend_tap_forward", "_tap_kernel"), "distances"),
        (("aten::linear", "aten::addmm", "cutlass_gemm"), "matrix products"),
        (("MatMul4BitBackward", "bitsandbytes::dequantize_4bit", "kDequantizeBlockwise"), "dequantisation"),
        (("nvjet_hsh_gemm",), "matrix products"),
        (("LigerRMSNormFunctionBackward", "_rms_norm_backward_kernel"), "norms and gates"),
        (("ScaledDotProductBackward0", "aten::_scaled_dot_product_flash_attention_backward"), "attention"),
        ((ranges.BACKWARD,), "Python and dispatch"),
        (("aten::add",), OTHER),
    ],
)
def test_the_outermost_known_name_says_the_kind(names: tuple[str, ...], kind: str) -> None:
    assert kind_of(names) == kind


def test_kernels_count_where_they_were_launched_not_where_they_run() -> None:
    """A GPU is behind its host; a kernel without a known launch goes with the one before it on the device."""
    slices = [
        Slice(30.0, 4.0, 5.0, ("aten::mm", "gemm")),
        Slice(34.0, 2.0, None, ("_rms_norm_forward_kernel",)),
        Slice(36.0, 8.0, 25.0, ("aten::mm", "gemm")),
    ]
    found = add_up(slices, MARKED)
    assert found == {
        ("reference pass", "matrix products"): pytest.approx(4e-6),
        ("reference pass", OTHER): pytest.approx(2e-6),
        ("backward", "matrix products"): pytest.approx(8e-6),
    }


class FakeKernel:
    """What kineto says of a kernel."""

    def __init__(self, name: str, link: int, start: int, annotation: bool = False) -> None:
        self._given = {
            "name": name,
            "linked_correlation_id": link,
            "start_ns": start,
            "duration_ns": 1000,
            "is_user_annotation": annotation,
        }

    def device_type(self) -> DeviceType:
        return DeviceType.CUDA

    def __getattr__(self, name: str) -> Any:
        return lambda: self._given[name]


def cpu_event(name: str, number: int, start: float, end: float, parent: Any = None) -> Any:
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, id=number, time_range=span, cpu_parent=parent, device_type=DeviceType.CPU)


def test_a_kernel_belongs_to_the_op_that_launched_it() -> None:
    """Calls of the CUDA runtime have numbers of their own, which are those of ops too; a kernel without a link is
    nobody's.
    """
    outer = cpu_event("repbend_kernels::low_rank_down", 7, 1.0, 4.0)
    events = [
        cpu_event(ranges.ADAPTED, 1, 0.0, 10.0),
        outer,
        cpu_event("aten::mm", 8, 2.0, 3.0, parent=outer),
        cpu_event("cudaLaunchKernel", 8, 20.0, 21.0),
        cpu_event("cuLaunchKernelEx", 7, 22.0, 23.0),
        cpu_event("aten::add", 0, 24.0, 25.0),
    ]
    kernels = [
        FakeKernel("gemm", 8, 30_000),
        FakeKernel("unknown", 0, 40_000),
        FakeKernel("a range", 8, 30_000, annotation=True),
    ]
    results = SimpleNamespace(events=lambda: kernels, trace_start_ns=lambda: 0)
    profile = SimpleNamespace(events=lambda: events, profiler=SimpleNamespace(kineto_results=results))
    slices, marked = read(profile, cuda=True)
    assert slices == [
        Slice(30.0, 1.0, 2.0, ("repbend_kernels::low_rank_down", "aten::mm", "gemm")),
        Slice(40.0, 1.0, None, ("unknown",)),
    ]
    assert add_up(slices, marked) == {
        ("adapted pass", "LoRA"): pytest.approx(1e-6),
        ("adapted pass", OTHER): pytest.approx(1e-6),
    }


def test_overlapping_streams_are_busy_once() -> None:
    slices = [Slice(start, length, None, ()) for start, length in ((0.0, 10.0), (2.0, 3.0), (8.0, 6.0), (20.0, 1.0))]
    assert busy_seconds(slices) == pytest.approx(15e-6)


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))}
    command = [
        sys.executable,
        "-m",
        "benchmarks.step.step_profile",
        "--smoke",
        "--sides",
        "ours,ours small,eager",
        "--rounds",
        "1",
        "--results",
        path,
    ]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "accounted for" in result.stdout
    return json.loads(path.read_text())


def test_the_parts_add_up_to_the_step(record) -> None:
    for row in record["rows"]:
        assert 0.95 <= accounted(row) <= 1.02, row["side"]


def parts_of(record: dict[str, Any], side: str) -> dict[str, float]:
    (row,) = (row for row in record["rows"] if row["side"] == side)
    found: dict[str, float] = {}
    for part in row["parts"]:
        found[part["part"]] = found.get(part["part"], 0.0) + part["seconds"]
    return found


def test_each_lever_shows_as_a_part(record) -> None:
    """``ours`` recomputes nothing and cuts nothing; ``ours small`` does both; a baseline marks no parts."""
    plain, small, eager = (parts_of(record, side) for side in ("ours", "ours small", "eager"))
    passes = {"reference pass", "adapted pass", "backward", "optimizer"}
    assert passes <= set(plain)
    assert not {"recomputed blocks", "first pass for coupled sums"} & set(plain)
    assert passes | {"recomputed blocks", "first pass for coupled sums"} <= set(small)
    assert set(eager) <= {OUTSIDE, "optimizer"}


def test_a_second_run_replaces_its_own_rows(tmp_path) -> None:
    path = tmp_path / "record.json"
    rows = [{"case": "c", "side": side, "optimizer": "adamw", "seconds": 1.0} for side in ("a", "b")]
    step_profile.write(path, rows)
    record = step_profile.write(path, [rows[1] | {"seconds": 2.0}])
    assert {row["side"]: row["seconds"] for row in record["rows"]} == {"a": 1.0, "b": 2.0}
