"""The training step: the published step, PEFT with Liger, and ours under several settings of its levers.

    pytest benchmarks/step/test_train_step.py --threads 2                          # every case of this machine
    pytest benchmarks/step/test_train_step.py --cases real --sides "eager,ours" --rounds 3
    pytest benchmarks/step/test_train_step.py --smoke --results FILE               # a tiny model: does it still run?

A step is the losses and the gradient of one micro-batch; the optimizer is not part of it. All sides use the same frozen
model, adapter values and batch. With dropout off their terms and gradients are compared with the first side's; a side
that disagrees is not timed. Then, with the published dropout, one step of every side measures memory, and each round
runs one of every side in turn. pytest-benchmark cannot interleave, so it is given the recorded rounds to report: its
clock here replays them.

The record is ``benchmarks/results/train_step_<hardware>.json``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import RESULTS, Machine, hardware_slug
from benchmarks.step.step_cases import Case, cases_for, load_base
from benchmarks.step.step_measure import NOT_PLANNED, OUT_OF_MEMORY, Measured, measure_case, train_within
from benchmarks.step.step_record import StepRecord
from benchmarks.step.step_sides import Side, budgets_for, sides_for
from repbend_fast.models.causal import CausalLM
from repbend_fast.planning.budget import parse_budget

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Replay:
    """A clock that stands still but for the recorded seconds that ``advance`` adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: Iterator[float]) -> None:
        """Let the next recorded round pass."""
        self.now += next(seconds)


CLOCK = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases, sides and caps that the command line selects."""
    option = metafunc.config.getoption
    cases = [c for c in cases_for(DEVICE, option("--smoke")) if _selected(c.name, option("--cases"))]
    if "side" in metafunc.fixturenames:
        # Not of the module's scope, as the case is: pytest would take the cases in turn, and measure each anew for
        # every side.
        metafunc.parametrize("side", _sides(metafunc.config), ids=lambda s: s.name)
    else:
        # The published batch and lengths, as a user of a small card would train.
        cases = [c for c in cases if c.lengths == "real" and c.weights in ("nf4", "float32") and c.examples > 1]
        metafunc.parametrize("budget", budgets_for(DEVICE, option("--smoke")), scope="module")
    metafunc.parametrize("case", cases, ids=lambda c: c.name, scope="module")


def _selected(name: str, wanted: str | None) -> bool:
    if not wanted:
        return not name.startswith("mistral")  # an option: it must be named
    return any(part in name for part in wanted.split(","))


def _sides(config: pytest.Config) -> list[Side]:
    wanted = config.getoption("--sides")
    return [s for s in sides_for(DEVICE, config.getoption("--smoke")) if not wanted or s.name in wanted.split(",")]


@pytest.fixture(scope="module")
def bases() -> Iterator[dict[tuple[str, str], CausalLM]]:
    """The loaded model, one at a time."""
    loaded: dict[tuple[str, str], CausalLM] = {}
    yield loaded
    loaded.clear()


@pytest.fixture(scope="module")
def base(case: Case, bases: dict[tuple[str, str], CausalLM]) -> CausalLM:
    """The case's frozen model."""
    key = (case.model.name, case.weights)
    if key not in bases:
        bases.clear()
        gc.collect()
        bases[key] = load_base(case, DEVICE)
    return bases[key]


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest, machine: Machine, smoke: bool) -> Iterator[StepRecord]:
    """What this run finds; written when it ends, also after a failed side, which has its reason in its row."""
    found = StepRecord()
    yield found
    path: Path | None = request.config.getoption("--results")
    if path or not smoke:
        found.write(path or RESULTS / f"train_step_{hardware_slug()}.json", machine)


@pytest.fixture(scope="module")
def measured(
    case: Case, base: CausalLM, record: StepRecord, machine: Machine, request: pytest.FixtureRequest
) -> dict[str, Measured]:
    """All sides of one case."""
    rounds = 1 if request.config.getoption("--smoke") else request.config.getoption("--rounds")
    found: list[Measured] = []
    try:
        measure_case(case, base, _sides(request.config), rounds, machine.matrix, found)
    finally:  # also where a time limit ends the run
        record.rows += [measured.row() for measured in found]
    return {measured.side: measured for measured in found}


@pytest.mark.benchmark(timer=CLOCK)
def test_train_step(benchmark: BenchmarkFixture, measured: dict[str, Measured], case: Case, side: Side) -> None:
    found = measured[side.name]
    if found.failure.startswith((OUT_OF_MEMORY, NOT_PLANNED)):
        pytest.skip(found.failure)
    assert not found.failure, found.failure
    benchmark.group = f"train step {case.name}"
    benchmark.extra_info.update(peak_bytes_above_model=found.peak_bytes, gradient_relative_error=found.gradient_error)
    benchmark.pedantic(CLOCK.advance, args=(iter(found.seconds),), rounds=len(found.seconds))


def test_training_keeps_its_budget(base: CausalLM, case: Case, budget: str, record: StepRecord, smoke: bool) -> None:
    row = train_within(case, base, budget, steps=2 if smoke else 20)
    record.trained.append(row)
    assert row.get("peak_bytes_allocated", 0) <= parse_budget(budget)
