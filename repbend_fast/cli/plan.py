"""``repbend-fast plan``: will it fit, and how fast would it be, from shapes alone."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from repbend_fast.console import terminal
from repbend_fast.errors import UserError

if TYPE_CHECKING:
    from repbend_fast.config import Config
    from repbend_fast.planning.planned import PlannedRow

# Recipe and, per budget in GB, the card whose rates the expected time is for.
TABLE_RECIPES = ("llama-3-8b-instruct", "mistral-7b-instruct-v0.2")
TABLE_BUDGETS = {8: "4060", 12: "3060", 16: "4070tis", 24: "4090", 40: "a100", 80: "h100"}


def show(arguments: Namespace) -> int:
    """``plan RECIPE``: prints one plan, with ``--table`` one line per model, quantisation and budget."""
    if arguments.table:
        return _table(arguments)
    if arguments.recipe is None:
        raise UserError(
            "RECIPE is missing; `repbend-fast recipes ls` lists the shipped ones (only --table does without)"
        )
    from repbend_fast.api import plan

    # A record on standard output is read by programs: what is said beside it goes past it.
    say = _to_standard_error if arguments.json else terminal
    planned = plan(arguments.recipe, arguments.overrides, overlays=arguments.overlays, card=arguments.card, say=say)
    print(json.dumps(planned.as_dict(), indent=2) if arguments.json else "\n".join(planned.lines()))
    return 0


def _to_standard_error(text: str) -> None:
    print(text, file=sys.stderr)


def _table(arguments: Namespace) -> int:
    rows = []
    recipes = (arguments.recipe,) if arguments.recipe else TABLE_RECIPES
    for recipe in recipes:
        for quantization in ("nf4", "none"):
            config = _table_config(recipe, quantization, arguments.overrides, arguments.overlays)
            for row in _table_rows(config, arguments.card):
                rows.append(row)
                if not arguments.json:
                    print(_table_line(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    return 0


def _table_rows(config: Config, card: str | None) -> list[PlannedRow]:
    """Predictions: the run at full depth, which ``plan RECIPE`` adds, would take minutes for all of them."""
    import torch

    from repbend_fast.planning.cards import GB, find_card
    from repbend_fast.planning.planned import PlannedRun
    from repbend_fast.planning.planner import Planner

    rows: list[PlannedRow] = []
    planner = Planner(config, torch.device("cuda"), find_card("a100"))
    for gigabytes, name in TABLE_BUDGETS.items():
        planner.use_card(find_card(card or name))
        try:
            plan = planner.plan(gigabytes * GB, check=False)
            rows.append(PlannedRun(config, planner.card, planner.device, plan).as_dict())
        except UserError:
            smallest, levers = planner.smallest()
            rows.append(
                {
                    "model": config.model.name,
                    "quantization": config.model.quantization,
                    "card": planner.card.name,
                    "budget_bytes": gigabytes * GB,
                    "levers": None,
                    "smallest_bytes": smallest,
                    "smallest_levers": levers.as_dict(),
                }
            )
    return rows


def _table_config(recipe: str, quantization: str, overrides: Sequence[str], overlays: Sequence[str]) -> Config:
    """The recipe with the table's settings, which ``overrides`` may replace, all but the quantisation."""
    from repbend_fast.config import load_config

    optimizer = "paged_adamw_8bit" if quantization == "nf4" else "adamw"
    defaults = [
        f"model.quantization={quantization}",
        f"training.optimizer={optimizer}",
        "memory.checkpoint_blocks=auto",
    ]
    config = load_config(recipe, overrides, overlays=overlays, defaults=defaults, needs_data=False)
    if config.model.quantization != quantization:
        raise UserError("model.quantization: plan --table has both, nf4 and none; leave it out")
    return config


def _table_line(row: PlannedRow) -> str:
    from repbend_fast.planning.budget import show_bytes
    from repbend_fast.planning.planner import show_levers
    from repbend_fast.step.levers import Levers

    weights = "nf4" if row["quantization"] == "nf4" else "bf16"
    budget = show_bytes(cast(int, row["budget_bytes"]))
    start = f"{row['model'].rsplit('/', 1)[-1]:<26} {weights:<5} {budget:>9}  {row['card']:<24}"
    if row["levers"] is None:
        return f"{start} does not fit; the smallest that does is {show_bytes(row['smallest_bytes'])}"
    seconds = f"{row['seconds_per_step']:7.1f} s/step"
    return f"{start} {show_bytes(row['total_bytes']):>9} {seconds}  {show_levers(Levers(**row['levers']))}"
