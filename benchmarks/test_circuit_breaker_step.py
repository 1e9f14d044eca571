"""The training step of Circuit Breakers: its published expression, and ours, on the step benchmark's model and lengths.

    pytest benchmarks/test_circuit_breaker_step.py --threads 2             # SmolLM2-135M at real lengths
    pytest benchmarks/test_circuit_breaker_step.py --smoke                 # a tiny model: does it still run?

A step is the losses and the gradient of one micro-batch, halfway through the schedule. Gradients are compared with dropout off
before anything is timed; then each round runs one step of either side in turn. Goals: at least 2 x faster with at most a quarter
of the memory above the model, at real lengths.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines.circuit_breaker_step import circuit_breaker_step
from baselines.eager_step import prepare_eager
from harness import RESULTS, Machine, hardware_slug, wait, write_record
from measure import peak_bytes, relative_error
from step_cases import LORA, Case, cases_for, fill_adapter, gradient_of, load_base, real_tokens
from torch import Tensor

from repbend_fast.config.objectives import CircuitBreakerConfig
from repbend_fast.config.schema import MemoryConfig
from repbend_fast.data.records import Batch
from repbend_fast.memory.levers import levers_of
from repbend_fast.models import attach_lora, find_decoder
from repbend_fast.objectives import build_objective
from repbend_fast.step import StreamRunner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEP, STEPS = 74, 150
PROGRESS = (STEP + 1) / (2 * STEPS)
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "nf4": 0.25}
FASTER, SMALLER = 2.0, 0.25

Step = Callable[[Batch], dict[str, Tensor]]


def _config(blocks: int) -> CircuitBreakerConfig:
    """Hidden states at the published third and two thirds of the depth."""
    return CircuitBreakerConfig(layers=[max(1, round(blocks * 10 / 32)), round(blocks * 20 / 32)])


def _sides(model: Any, case: Case, config: CircuitBreakerConfig) -> dict[str, tuple[Callable[[], None], Step]]:
    """Set-up and step of either side."""
    objective = build_objective(config, find_decoder(model).num_blocks, STEPS)
    runner = StreamRunner(model, levers_of(MemoryConfig(), model), uses_head=False)

    def ours(batch: Batch) -> dict[str, Tensor]:
        streams = objective.streams(batch, STEP)
        return {name: value for s in streams for name, value in runner.backward(s, dropout_seed=1).terms.items()}

    def start_ours() -> None:
        model.gradient_checkpointing_disable()
        model.eval()

    eager: Step = lambda batch: circuit_breaker_step(model, batch, config, PROGRESS, case.width)  # noqa: E731
    return {"eager": (lambda: prepare_eager(model), eager), "ours": (start_ours, ours)}


def _set_dropout(model: Any, p: float) -> None:
    for module in model.modules():
        for layer in getattr(module, "lora_dropout", {}).values():
            layer.p = p


def measure(case: Case, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds, peak bytes above the model and errors of either side.

    Raises:
        AssertionError: ours computes something else.
    """
    base = load_base(case, DEVICE)
    config = _config(find_decoder(base).num_blocks)
    model = attach_lora(base, LORA, (max(config.layers),))
    fill_adapter(model)
    batch = case.batch(base.config.get_text_config().vocab_size)
    found: dict[str, dict[str, Any]] = {"eager": {"seconds": []}, "ours": {"seconds": []}}

    def run(side: str, measured: Callable[[Step], Any]) -> Any:
        start, step = _sides(model, case, config)[side]
        model.zero_grad(set_to_none=True)
        start()
        return measured(step)

    _set_dropout(model, 0.0)
    gradients = {}
    for side in found:
        run(side, lambda step: step(batch))
        gradients[side] = gradient_of(model)
    found["ours"]["gradient_error"] = relative_error(gradients["ours"], gradients["eager"])
    assert found["ours"]["gradient_error"] <= TOLERANCE[case.weights], found["ours"]["gradient_error"]

    _set_dropout(model, LORA.dropout)
    for _ in range(rounds):
        for side in found:
            found[side]["seconds"].append(run(side, lambda step: _seconds(step, batch)))
    for side in found:
        found[side]["peak_bytes"] = run(side, lambda step: peak_bytes(lambda: step(batch), DEVICE))
        found[side]["tokens"] = real_tokens(batch)
    return found


def _seconds(step: Step, batch: Batch) -> float:
    wait(DEVICE)
    begun = time.perf_counter()
    step(batch)
    wait(DEVICE)
    return time.perf_counter() - begun


def test_circuit_breaker_step(request: pytest.FixtureRequest, machine: Machine, smoke: bool) -> None:
    case = next(c for c in cases_for(DEVICE, smoke) if c.lengths == "real")
    found = measure(case, 1 if smoke else request.config.getoption("--rounds"))
    medians = {side: statistics.median(values["seconds"]) for side, values in found.items()}
    faster, share = medians["eager"] / medians["ours"], found["ours"]["peak_bytes"] / found["eager"]["peak_bytes"]
    path: Path | None = request.config.getoption("--results")
    if path or not smoke:
        rows = [
            {"op": "circuit_breaker_step", "case": f"{case.name}-{side}", "median_seconds": round(medians[side], 4), **values}
            for side, values in found.items()
        ]
        rows.append(
            {"op": "circuit_breaker_step", "case": f"{case.name}-ratio", "times_faster": round(faster, 3), "memory_share": round(share, 4)}
        )
        write_record(path or RESULTS / f"circuit_breaker_step_{hardware_slug()}.json", rows, machine)
    if not smoke:
        assert faster >= FASTER, f"{faster:.2f} x the eager step's speed"
        assert share <= SMALLER, f"{share:.2f} of the eager step's memory"
