"""The step benchmark: its baselines agree with the published implementation's record, and it runs, records and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import step_sides
import torch
from baselines.batches import weighted_sum, weights
from baselines.eager_step import eager_step, prepare_eager
from baselines.peft_liger_step import peft_liger_step, prepare_peft_liger
from kernel_compare import relative_l2
from peft import PeftModel
from safetensors.torch import load_file
from step_cases import cases_for, load_base
from step_measure import measure_case, ratios_of, rows_of
from step_sides import Side
from torch import Tensor

from repbend_fast.config.schema import ModelConfig, ObjectiveConfig
from repbend_fast.golden import load_batch
from repbend_fast.models import load_model
from repbend_fast.verify import GRADIENT_TOLERANCE, LOSS_TOLERANCE

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "repbend"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CASES = {case["key"]: case for case in EXPECTED["cases"]}
WIDTH = 64
BASELINES = {
    "eager": (prepare_eager, lambda model, batch, config: eager_step(model, batch, config, WIDTH)),
    "peft+liger": (prepare_peft_liger, peft_liger_step),
}


@pytest.fixture(scope="module", params=BASELINES)
def baseline(request) -> Any:
    base = load_model(ModelConfig(name=str(GOLDEN / "base_model"), dtype="float32", device="cpu"))
    model = PeftModel.from_pretrained(base, str(GOLDEN / "adapter"), is_trainable=True)
    prepare, step = BASELINES[request.param]
    prepare(model)
    return model, step


def golden_config(case: dict[str, Any]) -> ObjectiveConfig:
    names = {"safe": "alpha", "unsafe": "beta", "cosine": "gamma", "kl": "epsilon"}
    window = EXPECTED["window"]
    return ObjectiveConfig(
        **{ours: float(case[theirs]) for ours, theirs in names.items()},
        window_start=window[0],
        window_size=len(window),
        loss_mode=case["loss_mode"].replace("request", "prompt"),
        alpha_mode=case["alpha_mode"],
        published_quirks=True,
    )


def golden_gradient(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def flattened(gradient: dict[str, Tensor], like: dict[str, Tensor]) -> Tensor:
    assert gradient.keys() == like.keys()
    return torch.cat([gradient[name].flatten().double() for name in sorted(like)])


@pytest.mark.parametrize("key", CASES)
def test_baseline_reproduces_the_published_values(baseline, key) -> None:
    model, step = baseline
    case = CASES[key]
    config = golden_config(case)
    model.zero_grad(set_to_none=True)
    terms = step(model, load_batch(GOLDEN / f"batch.{case['batch']}.json"), config)
    scale = sum(abs(weights(config)[name] * float(value)) for name, value in terms.items())
    assert abs(float(weighted_sum(terms, config)) - case["loss"]) <= LOSS_TOLERANCE * scale
    gradient = golden_gradient(model)
    norm = float(sum(g.double().square().sum() for g in gradient.values()) ** 0.5)
    assert norm == pytest.approx(case["grad_norm"], rel=GRADIENT_TOLERANCE)
    recorded = GOLDEN / f"grads.{key}.safetensors"
    if recorded.is_file():
        expected = load_file(recorded)
        got, exact = flattened(gradient, expected), flattened(expected, expected)
        assert relative_l2(got, exact) <= GRADIENT_TOLERANCE
        for wrong in (torch.zeros_like(got), -got, got.roll(1)):
            assert relative_l2(wrong, exact) > GRADIENT_TOLERANCE


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "pytest", "benchmarks/test_train_step.py", "-q", "-p", "no:cacheprovider", "--smoke", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_the_benchmark_compares_measures_and_records(tmp_path) -> None:
    path = tmp_path / "train_step.json"
    result = bench("--cases", "real", "--results", str(path))
    assert result.returncode == 0, result.stdout[-4000:]
    record = json.loads(path.read_text())
    assert {"hardware", "versions", "commit", "date", "gemm_tflop_per_s"} <= set(record)
    rows = {row["side"]: row for row in record["rows"]}
    assert {"eager", "peft+liger", "ours fast", "ours small"} <= set(rows)
    for row in rows.values():
        assert row["loss_relative_error"] < 1e-4
        assert row["gradient_relative_error"] < 1e-4
        assert all(value != 0 for value in row["terms"].values())
        assert 0 < row["peak_bytes_above_model"] < row["peak_bytes_total"]
        assert row["seconds_median"] > 0
        assert row["tokens"] == rows["eager"]["tokens"] > 0
    small = next(r for r in record["ratios"] if r["side"] == "ours small")
    share = rows["ours small"]["peak_bytes_above_model"] / rows["eager"]["peak_bytes_above_model"]
    assert small["memory_share_of_eager"] == pytest.approx(share, abs=1e-4)
    assert small["memory_share_of_eager"] < 1


def test_a_side_that_disagrees_is_not_timed(monkeypatch) -> None:
    def flipped(model, batch, config):
        terms = peft_liger_step(model, batch, config)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()
        return terms

    monkeypatch.setattr(step_sides, "peft_liger_step", flipped)
    case = cases_for(torch.device("cpu"), smoke=True)[0]
    base = load_base(case, torch.device("cpu"))
    found = measure_case(case, base, [Side("eager"), Side("peft+liger")], rounds=1)
    assert "disagrees with eager" in found["peft+liger"].failure
    assert found["peft+liger"].seconds == []
    rows = {row["side"]: row for row in rows_of(case, base, found, matrix=1.0)}
    assert "not timed" in rows["peft+liger"]["failure"]
    assert rows["eager"]["seconds_median"] > 0
    assert ratios_of(list(rows.values())) == []
