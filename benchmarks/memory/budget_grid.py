"""Is a memory budget kept? Training steps under a grid of budgets on the CPU, their measured tensor peak beside budget
and plan.

    python -m benchmarks.memory.budget_grid                      the demo recipe; writes results/budget_cpu.json
    python -m benchmarks.memory.budget_grid RECIPE key=value …   another recipe, or other settings
    options: --shares 0.9,0.5,0   budgets between the smallest that can be kept (0) and what no budget takes (1)
             --steps 2            optimizer steps per budget, at the longest lengths of the data
             --random             random weights of the model's shape instead of its own

The peak counts the model: weights plus the allocator's own record of the steps (``measure.peak_bytes``). Exit code 1 if
a budget was exceeded by more than 3 %, or the plan without a budget was off by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TypedDict

import torch

from benchmarks.harness import RESULTS, write_json
from benchmarks.measure import peak_bytes
from repbend_fast.config import Config, load_config
from repbend_fast.data.records import Batch
from repbend_fast.models import attach_lora, load_model, prepared, trainable_parameters
from repbend_fast.models.autocast import autocast_dtype
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import find_decoder
from repbend_fast.models.load import DTYPES
from repbend_fast.objectives import build_objective
from repbend_fast.planning.batches import Limits, limits_of_sets, worst_batch
from repbend_fast.planning.planner import Planner
from repbend_fast.planning.shapes import model_shape
from repbend_fast.planning.tracker import module_tensors, tensor_bytes
from repbend_fast.step import StreamRunner
from repbend_fast.step.levers import Levers
from repbend_fast.training.optimizer import build_optimizer

ALLOWED_OVER, ALLOWED_OFF = 1.03, 0.10
SHARES = (0.9, 0.7, 0.5, 0.35, 0.2, 0.1, 0.0)
CPU = torch.device("cpu")


class GridRow(TypedDict):
    """One budget, None for no budget: what was planned for it and what was measured."""

    budget_bytes: int | None
    planned_bytes: int
    measured_bytes: float
    measured_to_budget: float | None
    planned_to_measured: float
    seconds_per_step: float
    levers: dict[str, object]


def random_model(config: Config) -> CausalLM:
    """The recipe's model with random weights, frozen, on the CPU."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_shape(config.model)[0], dtype=DTYPES[config.model.dtype])
    return model.requires_grad_(False).eval()


def training_peak(base: CausalLM, config: Config, levers: Levers, batch: Batch, steps: int = 2) -> dict[str, float]:
    """Peak tensor bytes of ``steps`` optimizer steps on ``batch``, weights included, and the seconds of one step.

    ``base`` gets a new adapter and is left without it.
    """
    objective = build_objective(config.objective, find_decoder(base).num_blocks, config.training.steps)
    model = attach_lora(base, config.lora, (objective.last_state,))
    ready = prepared(model, levers)
    runner = StreamRunner(ready, levers, autocast=autocast_dtype(config, ready.device), uses_head=objective.uses_head)
    optimizer = build_optimizer(trainable_parameters(model), config.training)
    began = time.perf_counter()

    def train() -> None:
        for step in range(steps):
            runner.backward_all(objective.streams(batch, step), dropout_seed=step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    weights = tensor_bytes(module_tensors(model))
    peak = weights + peak_bytes(train, CPU)
    seconds = (time.perf_counter() - began) / steps
    ready.restore()
    model.unload()
    return {"bytes": peak, "seconds": seconds}


def grid(config: Config, base: CausalLM, limits: Limits, shares: Seq[float], steps: int) -> list[GridRow]:
    """One row without a budget, then one per share of the way from the smallest budget to that."""
    planner = Planner(config, CPU, limits=limits)
    batch = worst_batch(config.training.sizes, limits)
    free = planner.plan(None)
    smallest, _ = planner.smallest()
    rows: list[GridRow] = []
    for share in (None, *shares):
        budget = None if share is None else int(smallest + share * (free.total - smallest))
        plan = planner.plan(budget)
        measured = training_peak(base, config, plan.levers, batch, steps)
        row: GridRow = {
            "budget_bytes": budget,
            "planned_bytes": plan.total,
            "measured_bytes": measured["bytes"],
            "measured_to_budget": None if budget is None else measured["bytes"] / budget,
            "planned_to_measured": plan.total / measured["bytes"],
            "seconds_per_step": measured["seconds"],
            "levers": plan.levers.as_dict(),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def kept(rows: list[GridRow]) -> bool:
    """Whether every budget was kept, and the plan without one was near."""
    over = [
        row for row in rows if row["budget_bytes"] is not None and (row["measured_to_budget"] or 0.0) > ALLOWED_OVER
    ]
    return not over and abs(rows[0]["planned_to_measured"] - 1) <= ALLOWED_OFF


def main(argv: Seq[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--with", action="append", default=[], dest="overlays", metavar="OVERLAY")
    parser.add_argument("--shares", type=lambda text: tuple(map(float, text.split(","))), default=SHARES)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "budget_cpu.json")
    arguments = parser.parse_args(argv)
    from repbend_fast.environment import environment
    from repbend_fast.models import load_tokenizer
    from repbend_fast.objectives import roles_of
    from repbend_fast.runs.prepare import prepare_data

    config = load_config(arguments.recipe, arguments.overrides, overlays=arguments.overlays)
    data = prepare_data(config, load_tokenizer(config.model), roles_of(config.objective))
    limits = limits_of_sets(data.sampler.sets, config)
    base = random_model(config) if arguments.random else load_model(config.model)
    rows = grid(config, base, limits, arguments.shares, arguments.steps)
    lengths = {"prompt": limits.prompt, "answer": limits.answer, "conversation": limits.conversation}
    record = {
        **environment(),
        "recipe": arguments.recipe,
        "overlays": arguments.overlays,
        "examples": config.training.examples,
        "longest": lengths,
        "rows": rows,
    }
    write_json(arguments.out, record)
    print(arguments.out)
    return 0 if kept(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
