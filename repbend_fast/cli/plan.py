"""``repbend-fast plan``: will it fit, and how fast would it be, from shapes alone."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from repbend_fast.errors import UserError

if TYPE_CHECKING:
    from repbend_fast.config import Config
    from repbend_fast.planning.cards import Card
    from repbend_fast.planning.planner import Plan, Planner

# Recipe and, per budget in GB, the card whose rates the expected time is for.
TABLE_RECIPES = ("llama-3-8b-instruct", "mistral-7b-instruct-v0.2")
TABLE_BUDGETS = {8: "4060", 12: "3060", 16: "4070tis", 24: "4090", 40: "a100", 80: "h100"}


def show(arguments: Namespace) -> int:
    """``plan RECIPE``: prints one plan, with ``--table`` one line per model, quantisation and budget."""
    if arguments.table:
        return _table(arguments)
    if arguments.recipe is None:
        raise UserError("RECIPE is missing; `repbend-fast recipes ls` lists the shipped ones (only --table does without)")
    from repbend_fast.config import load_config
    from repbend_fast.planning.planner import Planner

    config = load_config(arguments.recipe, arguments.overrides)
    card, device = _target(arguments.card, config)
    planner = Planner(config, device, card)
    plan = planner.plan(_budget(config, card, device, named=arguments.card is not None))
    if arguments.json:
        print(json.dumps(as_record(planner, plan), indent=2))
        return 0
    for note in plan.notes:
        print(f"note: {note}")
    print("\n".join(_lines(planner, plan)))
    return 0


def as_record(planner: Planner, plan: Plan) -> dict[str, Any]:
    """A plan as plain values: bytes, FLOPs and seconds per optimizer step, the levers, what limits it."""
    return {
        "model": planner.config.model.name,
        "quantization": planner.config.model.quantization,
        "device": planner.device.type,
        "card": planner.card.name,
        "budget_bytes": plan.budget,
        "levers": plan.levers.as_dict(),
        "standing_bytes": asdict(plan.standing),
        "stream_bytes": dict(plan.streams),
        "total_bytes": plan.total,
        "flops_per_step": dict(plan.flops),
        "tokens_per_step": plan.tokens,
        "seconds_per_step": plan.seconds if planner.device.type == "cuda" else None,
        "limit": plan.limit,
        "notes": list(plan.notes),
    }


def _target(name: str | None, config: Config) -> tuple[Card, Any]:
    import torch

    from repbend_fast.models.load import resolve_device
    from repbend_fast.planning.cards import card_of, find_card

    if name is not None:
        card = find_card(name)
        return card, torch.device(card.kind)
    device = resolve_device(config.model.device)
    return card_of(device), device


def _budget(config: Config, card: Card, device: Any, named: bool) -> int | None:
    """The recipe's budget; ``auto``, or none for a named card, is the card's own memory."""
    from repbend_fast.planning.budget import budget_bytes, parse_budget

    text = config.memory.budget
    if named and card.memory and (text is None or parse_budget(text) is None):
        return card.memory
    return budget_bytes(text, device)


def _lines(planner: Planner, plan: Plan) -> list[str]:
    from repbend_fast.planning.budget import show_bytes
    from repbend_fast.planning.cards import EFFICIENCY
    from repbend_fast.planning.planner import show_levers

    config, stays = planner.config, plan.standing
    budget = f"budget {show_bytes(plan.budget)}" if plan.budget else "no budget"
    lines = [f"{config.model.name} ({config.model.quantization}) on {planner.card.name}, {budget}; planned, not measured"]
    lines += ["levers", f"  {show_levers(plan.levers)}", "memory at the longest lengths"]
    parts = {"base model": stays.weights, "adapter": stays.adapter, "gradients": stays.gradients, "optimizer": stays.optimizer}
    parts["CUDA context" if planner.device.type == "cuda" else "best adapter"] = stays.other
    parts |= {f"step, {name} stream": size for name, size in plan.streams.items()}
    width = max(map(len, parts))
    lines += [f"  {name:<{width}}  {show_bytes(size):>9}" for name, size in parts.items() if size]
    reserve = " and the reserve for fragmentation" if planner.device.type == "cuda" else ""
    lines.append(
        f"  {'peak':<{width}}  {show_bytes(plan.total):>9}  the largest stream{reserve} on top of the rest, once the model is there"
    )
    lines.append("loading is not planned: while weights are read, dequantised or merged, the process may hold more for a moment")
    lines.append(f"FLOPs per optimizer step, {plan.tokens:.0f} tokens at published lengths")
    lines += [f"  {name:<{width}}  {value / 1e12:9.2f} T" for name, value in plan.flops.items()]
    lines.append(f"  {'all':<{width}}  {sum(plan.flops.values()) / 1e12:9.2f} T")
    if planner.device.type == "cuda":
        rate = f"{plan.tokens / plan.seconds:.0f} tokens/s"
        lines.append(f"expected  {plan.seconds:.1f} s per optimizer step, {rate}, taking {EFFICIENCY:.0%} of the tensor rate as reached")
    lines.append(f"limited by  {plan.limit}")
    return lines


def _table(arguments: Namespace) -> int:
    rows = []
    recipes = (arguments.recipe,) if arguments.recipe else TABLE_RECIPES
    for recipe in recipes:
        for config in [_table_config(recipe, quantization, arguments.overrides) for quantization in ("nf4", "none")]:
            for row in _table_rows(config, arguments.card):
                rows.append(row)
                if not arguments.json:
                    print(_table_line(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    return 0


def _table_rows(config: Config, card: str | None) -> list[dict[str, Any]]:
    """Predictions: the run at full depth, which ``plan RECIPE`` adds, would take minutes for all of them."""
    import torch

    from repbend_fast.planning.cards import GB, find_card
    from repbend_fast.planning.planner import Planner

    rows = []
    planner = Planner(config, torch.device("cuda"), find_card("a100"))
    for gigabytes, name in TABLE_BUDGETS.items():
        planner.use_card(find_card(card or name))
        try:
            rows.append(as_record(planner, planner.plan(gigabytes * GB, check=False)))
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


def _table_config(recipe: str, quantization: str, overrides: list[str]) -> Config:
    """The recipe with the table's settings, which ``overrides`` may replace, all but the quantisation."""
    from repbend_fast.config import load_config

    optimizer = "paged_adamw_8bit" if quantization == "nf4" else "adamw"
    defaults = [f"model.quantization={quantization}", f"training.optimizer={optimizer}", "memory.checkpoint_blocks=auto"]
    config = load_config(recipe, overrides, defaults=defaults)
    if config.model.quantization != quantization:
        raise UserError("model.quantization: plan --table has both, nf4 and none; leave it out")
    return config


def _table_line(row: dict[str, Any]) -> str:
    from repbend_fast.planning.budget import show_bytes
    from repbend_fast.planning.planner import show_levers
    from repbend_fast.step.levers import Levers

    weights = "nf4" if row["quantization"] == "nf4" else "bf16"
    start = f"{row['model'].rsplit('/', 1)[-1]:<26} {weights:<5} {show_bytes(row['budget_bytes']):>9}  {row['card']:<24}"
    if row["levers"] is None:
        return f"{start} does not fit; the smallest that does is {show_bytes(row['smallest_bytes'])}"
    seconds = f"{row['seconds_per_step']:7.1f} s/step"
    return f"{start} {show_bytes(row['total_bytes']):>9} {seconds}  {show_levers(Levers(**row['levers']))}"
