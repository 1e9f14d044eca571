"""The benchmark of Circuit Breakers: its baseline is the published expression, and it runs and records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import flat, gradients

from benchmarks.baselines.circuit_breaker_step import circuit_breaker_step
from benchmarks.baselines.eager_step import prepare_eager
from repbend_fast.config.schema import ModelConfig
from repbend_fast.models import load_model
from repbend_fast.verify.golden import Case, read_case, read_json

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "baselines"


@pytest.mark.parametrize("step", [1, 75, 150])
@pytest.mark.parametrize("width", [None, 40])
def test_the_baseline_is_the_published_expression(step, width) -> None:
    expected = read_json(GOLDEN / "expected.json")
    (entry,) = [c for c in expected["cases"] if c.get("step") == step]
    case: Case = read_case(GOLDEN, entry["key"], entry, entry, expected)
    base = load_model(ModelConfig(name=str(GOLDEN / "base_model"), dtype="float32", device="cpu"))
    model = PeftModel.from_pretrained(base, str(GOLDEN / "adapter"), is_trainable=True)
    prepare_eager(model)
    # Without the quirk padding counts nowhere, so that a wider batch has the recorded value of the unpadded one.
    config = case.config.model_copy(update={"published_quirks": width is None})
    progress = step / (2 * 150)
    terms = circuit_breaker_step(model, case.batch, config, progress, width)
    loss = config.coefficient * (progress * terms["retain"] + (1 - progress) * terms["reroute"])
    assert float(loss) == pytest.approx(entry["loss"], rel=1e-5)
    recorded = GOLDEN / f"grads.{entry['key']}.safetensors"
    got = flat(gradients(model))
    assert float(got.norm()) == pytest.approx(entry["grad_norm"], rel=1e-4)
    if recorded.is_file():
        exact = flat(load_file(recorded))
        assert float((got - exact).norm() / exact.norm()) < 1e-4


def test_the_benchmark_runs_and_records(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "benchmarks/step/test_circuit_breaker_step.py",
        "--smoke",
    ]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--results", str(tmp_path / "r.json")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["case"].rsplit("-", 1)[1]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows.keys() == {"eager", "ours", "ours fast", "ours small"}
    for side, row in rows.items():
        assert row["median_seconds"] > 0
        assert row["peak_bytes"] > 0
        assert (
            (row["times_faster"], row["memory_share"]) == (1, 1)
            if side == "eager"
            else 0 < row["gradient_error"] < 1e-3
        )
