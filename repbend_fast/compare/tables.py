"""A comparison as a Markdown table and as one for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from repbend_fast.evaluate.rates import KEYS, format_value

Record = Mapping[str, Any]

COLUMNS = {
    "attack_direct": "attack, direct",
    "attack_prefill": "attack, prefilled",
    "helpful_ordinary": "helpful, ordinary",
    "helpful_borderline": "helpful, borderline",
    "degenerate_ordinary": "degenerate",
    "kl": "KL",
    "perplexity": "perplexity",
    "perplexity_ratio": "× before",
    "seconds": "seconds of training",
    "peak_memory_bytes": "peak memory",
}


def markdown(record: Record) -> str:
    """The settings in a line, the table, and for each method the rate that was chosen and why."""
    settings = record["settings"]
    seeds = settings["seeds"]
    head = f"{settings['model']}, {settings['steps']} steps of {settings['batch']} examples, " + (
        f"seed {seeds[0]}." if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}: median (lowest–highest)."
    )
    lines = [head, "", _line(["method", "learning rate", *COLUMNS.values()]), _line(["---", *["---:"] * (len(COLUMNS) + 1)])]
    lines.append(_line(["before", "", *before_cells(record["before"]).values()]))
    methods = record["methods"]
    lines += [_line([method["name"], f"{method['learning_rate']:g}", *cells(method).values()]) for method in methods]
    lines += ["", f"Learning rates, of {', '.join(f'{rate:g}' for rate in settings['rates'])}, chosen on validation:", ""]
    lines += [f"- {chosen_line(record, method)}" for method in methods]
    kept_nothing = [(m["name"], s["seed"]) for m in methods for s in m["seeds"] if s["best_step"] == 0]
    if kept_nothing:
        named = ", ".join(f"{name} with seed {seed}" for name, seed in kept_nothing)
        lines += ["", f"No adapter of {named} stayed within validation's limits: measured there is the model as it was."]
    return "\n".join(lines) + "\n"


def chosen_line(record: Record, method: Record) -> str:
    """Which learning rate a method got, and why."""
    return f"{method['name']}: learning rate {method['learning_rate']:g}; {record['search'][method['recipe']]['why']}"


def terminal(record: Record, width: int) -> Table:
    """Measures down, methods across: a terminal has more lines than columns. No spreads where they do not fit into ``width`` characters."""
    seeds, methods = record["settings"]["seeds"], record["methods"]
    spread = len(seeds) > 1 and width >= 34 + 20 * len(methods)
    caption = f"median{' (lowest–highest)' if spread else ''} of {len(seeds)} seeds{'' if spread else '; compare.md has their spread'}"
    out = Table(title="Comparison on the test prompts", caption=None if len(seeds) == 1 else caption)
    out.add_column("measure", overflow="fold")
    sides = {"before": before_cells(record["before"])} | {method["name"]: cells(method, spread) for method in methods}
    for name in sides:
        out.add_column(name.replace("_", " "), justify="right", overflow="fold")
    out.add_row("learning rate", "", *(f"{method['learning_rate']:g}" for method in methods))
    for key, title in COLUMNS.items():
        out.add_row(title, *(side[key] for side in sides.values()))
    return out


def before_cells(before: Record) -> dict[str, str]:
    """By column; what training costs stays empty."""
    costs = ("seconds", "peak_memory_bytes")
    return {key: "" if key in costs else value_text(key, before.get(key)) for key in COLUMNS}


def cells(method: Record, spread: bool = True) -> dict[str, str]:
    """By column, the median over the seeds and behind it in brackets, where there are several, the lowest and the highest."""
    out = {}
    for key in COLUMNS:
        text = value_text(key, method["median"].get(key))
        if spread and len(method["seeds"]) > 1 and key in method["spread"]:
            low, high = (value_text(key, value) for value in method["spread"][key])
            text += f" ({low.split()[0]}–{high.split()[0]})"
        out[key] = text
    return out


def value_text(key: str, value: float | None) -> str:
    """One value with its unit."""
    if value is None or key in KEYS:
        return format_value(key, value)
    if key == "peak_memory_bytes":
        return f"{value / 2**30:.2f} GiB"
    return f"{value:.3f}" if key == "perplexity_ratio" else f"{value:.0f}"


def _line(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"
