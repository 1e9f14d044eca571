"""The training step of Circuit Breakers: its published expression, and ours, on the step benchmark's model and lengths.

    pytest benchmarks/step/test_circuit_breaker_step.py --threads 2             # SmolLM2-135M at real lengths
    pytest benchmarks/step/test_circuit_breaker_step.py --smoke                 # a tiny model: does it still run?

A step is the losses and the gradient of one micro-batch, halfway through the schedule. Gradients are compared with
dropout off before anything is timed; then each round runs one step of every side in turn. Goal: a setting of the levers
that is at least 2 x faster with at most a quarter of the memory above the model, at real lengths.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import pytest
import torch
from torch import Tensor

from benchmarks.baselines.circuit_breaker_step import circuit_breaker_step
from benchmarks.baselines.eager_step import prepare_eager
from benchmarks.harness import RESULTS, Machine, hardware_slug, wait, write_record
from benchmarks.measure import peak_bytes, relative_error
from benchmarks.step.step_cases import LORA, Case, cases_for, fill_adapter, gradient_of, load_base, real_tokens
from repbend_fast.config.schema import MemoryConfig
from repbend_fast.data.records import Batch
from repbend_fast.models import attach_lora, find_decoder, prepared
from repbend_fast.models.causal import AdaptedLM
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.lora import set_dropout_rate
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.circuit_breaker import CircuitBreakerConfig
from repbend_fast.step import StreamRunner
from repbend_fast.step.levers import levers_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEP, STEPS = 74, 150
PROGRESS = (STEP + 1) / (2 * STEPS)
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "nf4": 0.25}
FASTER, SMALLER = 2.0, 0.25
SIDES: dict[str, dict[str, Any]] = {
    "eager": {},
    "ours": {},
    "ours fast": {"piece_tokens": 1536, "checkpoint_blocks": 0},
    "ours small": {"piece_tokens": 512, "checkpoint_blocks": 18},
}
"""Our sides with their settings of ``memory``."""

Step = Callable[[Batch], dict[str, Tensor]]
T = TypeVar("T")


class Found(TypedDict, total=False):
    """What was measured of one side."""

    seconds: list[float]
    gradient_error: float
    peak_bytes: int
    tokens: int
    median_seconds: float
    times_faster: float
    memory_share: float


def _config(blocks: int) -> CircuitBreakerConfig:
    """Hidden states at the published third and two thirds of the depth."""
    return CircuitBreakerConfig(layers=[max(1, round(blocks * 10 / 32)), round(blocks * 20 / 32)])


@contextmanager
def _side(name: str, model: AdaptedLM, case: Case, config: CircuitBreakerConfig, dropout: float) -> Iterator[Step]:
    """The step of one side, set up on the model, which is without it afterwards."""
    model.zero_grad(set_to_none=True)
    if name == "eager":
        changes = Changes()
        set_dropout_rate(model, dropout, changes)
        prepare_eager(model)
        yield lambda batch: circuit_breaker_step(model, batch, config, PROGRESS, case.width)
        changes.undo()
        return
    model.gradient_checkpointing_disable()
    model.eval()
    objective = build_objective(config, find_decoder(model).num_blocks, STEPS)
    levers = levers_of(MemoryConfig(**SIDES[name]), model)
    with prepared(model, levers, dropout=dropout) as ready:
        runner = StreamRunner(ready, levers, uses_head=False)

        def ours(batch: Batch) -> dict[str, Tensor]:
            streams = objective.streams(batch, STEP)
            return {name: value for s in streams for name, value in runner.backward(s, dropout_seed=1).terms.items()}

        yield ours


def measure(case: Case, rounds: int) -> dict[str, Found]:
    """Seconds, peak bytes above the model and errors of every side.

    Raises:
        AssertionError: ours computes something else.
    """
    base = load_base(case, DEVICE)
    config = _config(find_decoder(base).num_blocks)
    model = attach_lora(base, LORA, (max(cast(list[int], config.layers)),))
    fill_adapter(model)
    batch = case.batch(base.config.get_text_config().vocab_size)
    found: dict[str, Found] = {side: {"seconds": []} for side in SIDES}

    def run(side: str, measured: Callable[[Step], T], dropout: float = LORA.dropout) -> T:
        with _side(side, model, case, config, dropout) as step:
            return measured(step)

    gradients = {}
    for side in found:
        run(side, lambda step: step(batch), dropout=0.0)
        gradients[side] = gradient_of(model)
    for side in list(found)[1:]:
        error = found[side]["gradient_error"] = relative_error(gradients[side], gradients["eager"])
        assert error <= TOLERANCE[case.weights], f"{side}: gradient error {error:.2g}"

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
    eager = found["eager"]
    for side, values in found.items():
        values["median_seconds"] = round(medians[side], 4)
        values["times_faster"] = round(medians["eager"] / medians[side], 3)
        values["memory_share"] = round(values["peak_bytes"] / eager["peak_bytes"], 4)
    path: Path | None = request.config.getoption("--results")
    if path or not smoke:
        rows = [
            {"op": "circuit_breaker_step", "case": f"{case.name}-{side}", **values} for side, values in found.items()
        ]
        write_record(path or RESULTS / f"circuit_breaker_step_{hardware_slug()}.json", rows, machine, whole=True)
    if not smoke:
        reached = {side: (v["times_faster"], v["memory_share"]) for side, v in found.items()}
        assert any(faster >= FASTER and share <= SMALLER for faster, share in reached.values()), reached
