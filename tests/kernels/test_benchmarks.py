"""The benchmarks themselves: they run, they refuse a wrong contender, and the report reads what they write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness, report
from benchmarks.measure import peak_bytes, relative_error

ROOT = Path(__file__).parents[2]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--smoke", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, timeout=300)


def test_every_benchmark_runs_small() -> None:
    result = bench("--benchmark-disable")
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


WRONG = """
import torch
import repbend_kernels
right = repbend_kernels.pairwise_cosine
repbend_kernels.pairwise_cosine = lambda states: right(states.flip(0)) + 0 * states.sum() + states.square().mean()
"""


def test_a_wrong_contender_is_not_timed(tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WRONG)
    result = bench(
        "--benchmark-disable",
        "-k",
        "pairwise and ours",
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "kernels")]),
    )
    assert result.returncode == 1
    assert "not timed" in result.stdout


@pytest.mark.parametrize(
    ("module", "contender", "outcome"),
    [
        ("benchmarks.baselines.distances", "published_pairwise_cosine", "1 skipped"),
        ("repbend_kernels", "pairwise_cosine", "1 failed"),
    ],
)
def test_a_baseline_without_room_is_skipped_and_ours_is_not(
    tmp_path, module: str, contender: str, outcome: str
) -> None:
    text = (
        f"import torch, {module}\n"
        "def no_room(*arguments):\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9.00 GiB.')\n"
        f"{module}.{contender} = no_room\n"
    )
    (tmp_path / "sitecustomize.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "kernels"), str(ROOT)])
    result = bench("--benchmark-disable", "-k", "pairwise", PYTHONPATH=path)
    assert outcome in result.stdout, result.stdout[-3000:]
    assert "1 passed" in result.stdout
    assert "Tried to allocate 9.00 GiB" in result.stdout


def test_peak_counts_what_is_held_at_one_time(device) -> None:
    def held_together() -> torch.Tensor:
        return torch.zeros(1000, device=device) + torch.ones(1000, device=device)

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.zeros(1000, device=device)

    assert peak_bytes(held_together, device) >= 12000
    assert 4000 <= peak_bytes(one_after_the_other, device) < 8000


def test_error_against_zero_is_not_small() -> None:
    assert relative_error(torch.tensor([1e-9]), torch.zeros(1)) == float("inf")
    assert relative_error(torch.zeros(1), torch.zeros(1)) == 0.0


def row(contender: str, **values: float) -> dict:
    defaults = {"op": "linear_kl_div", "case": "1x2x3", "median_ms": 1.0, "peak_bytes": 100, "returned_bytes": 1}
    return {**defaults, "error_value": 1e-7, "error_gradient": 1e-7, "contender": contender, **values}


def record(*rows: dict) -> dict:
    head = {"hardware": "some machine", "threads": 1, "versions": {"torch": "2"}, "commit": "c", "date": "d"}
    return {**head, "copy_gb_per_s": 1.0, "gemm_tflop_per_s": 1.0, "rows": list(rows)}


def test_report_compares_with_eager_and_finds_missed_goals(tmp_path) -> None:
    good = record(row("eager", peak_bytes=900), row("ours"))
    assert "1/9.0" in report.table(good)
    assert report.missed_goals(good) == []
    bad = record(row("eager", error_gradient=1e-6), row("ours", median_ms=1.5, error_gradient=3e-6))
    assert [line.split(": ")[1] for line in report.missed_goals(bad)] == [
        "memory above 1/8 of eager's",
        "slower than eager",
        "gradient error above eager's",
    ]
    report.draw(good, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_report_finds_missed_goals_of_a_gpu() -> None:
    def gpu(**changes: float) -> list[str]:
        tap, head = {"op": "bend_tap", "error_gradient": 1e-3}, {"case": report.GPU_CASES["linear_kl_div"]}
        rows = [
            row(
                "ours",
                **tap,
                case=f"{report.GPU_CASES['bend_tap']}, forward",
                percent_of_copy=changes.get("forward", 85.0),
            ),
            row(
                "ours",
                **tap,
                case=f"{report.GPU_CASES['bend_tap']}, backward",
                percent_of_copy=changes.get("backward", 90.0),
            ),
            row("ours", **head, median_ms=changes.get("ours", 11.5)),
            row("its three products", **head, median_ms=10.0),
            row("fla FusedKLDivLoss", **head, median_ms=20.0, peak_bytes=changes.get("fla", 200)),
        ]
        return report.missed_goals({**record(*rows), "device": "cuda"})

    assert gpu() == []
    assert gpu(forward=84.9) == ["bend_tap forward: 84.9 % of a copy's bandwidth, the goal is 85"]
    assert gpu(backward=10.0) == ["bend_tap backward: 10.0 % of a copy's bandwidth, the goal is 85"]
    assert gpu(ours=11.6) == ["linear_kl_div: 1.16 times its three products, the goal is 1.15"]
    assert gpu(fla=99) == ["linear_kl_div: peak_bytes above fla FusedKLDivLoss's"]


def test_a_run_that_did_not_pass_keeps_what_it_did_not_measure(tmp_path) -> None:
    path, machine = tmp_path / "record.json", harness.Machine(1.0, 1.0)

    def contenders() -> dict[str, float]:
        return {row["contender"]: row["median_ms"] for row in json.loads(path.read_text())["rows"]}

    harness.write_record(path, [row("ours"), row("eager")], machine, whole=True)
    harness.write_record(path, [row("ours", median_ms=2.0)], machine, whole=False)
    assert contenders() == {"ours": 2.0, "eager": 1.0}
    harness.write_record(path, [row("ours", median_ms=3.0)], machine, whole=True)
    assert contenders() == {"ours": 3.0}


def test_a_run_cut_off_by_its_time_limit_leaves_its_record(tmp_path) -> None:
    """A second contender that never ends, and SIGTERM: the first one's row is there."""
    slow = "import repbend_kernels, time\n_ = repbend_kernels.pairwise_cosine\n"
    slow += "repbend_kernels.window_distance = lambda *a, **k: (print('waiting', flush=True), time.sleep(300))\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT / "kernels")])
    options = ["--smoke", "--benchmark-enable", "--results", str(tmp_path / "r.json"), "-s", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "benchmarks/ops/bench_distances.py", *options]
    run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for line in run.stdout:
        if "waiting" in line:
            break
    run.send_signal(signal.SIGTERM)
    run.stdout.read()
    assert run.wait(timeout=60) != 0
    assert {row["op"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]} == {"bend_distance"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_recorded_op_results_keep_their_goals_or_are_said_not_to(path: Path) -> None:
    found = json.loads(path.read_text())
    if "copy_gb_per_s" not in found:
        pytest.skip("a record of another kind")
    assert {"hardware", "versions", "commit", "date"} <= set(found)
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert [line for line in report.missed_goals(found) if line not in text] == []
