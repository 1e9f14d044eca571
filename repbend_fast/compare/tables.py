"""A comparison as a Markdown table and as one for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from rich.table import Table

from repbend_fast.compare.record import ComparisonRecord, MethodRecord, SettingsRecord
from repbend_fast.evaluation.rates import (
    ATTACK_GROUPS,
    GROUP_ENDS,
    GROUP_KEYS,
    GROUP_NAMES,
    KEYS,
    OUTCOMES,
    Side,
    format_value,
)
from repbend_fast.objectives.sections import Aim

ROWS = {
    **{
        key: f"{GROUP_NAMES[group]}: {outcome}"
        for group, keys in GROUP_KEYS.items()
        for key, outcome in zip(keys, OUTCOMES[group], strict=True)
    },
    "kl": "KL",
    "perplexity": "perplexity",
    "perplexity_ratio": "× before",
    "seconds": "seconds of training",
    "peak_memory_bytes": "peak memory",
}
ENDS = GROUP_ENDS | {"perplexity_ratio"}
ABREAST = 6
"""The most methods that one table has side by side; of more an overview comes first, and then a table for each kind."""


def markdown(record: ComparisonRecord) -> str:
    """The settings in a line, the table, and for each method the rate that was chosen and why."""
    settings = record["settings"]
    seeds = settings["seeds"]
    head = f"{settings['model']}, {settings['steps']} steps of {settings['batch']} examples, " + (
        f"seed {seeds[0]}." if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}: median (lowest–highest)."
    )
    methods = record["methods"]
    lines = [
        head,
        "",
        *markdown_tables(record),
        "",
        _searched(settings),
        "",
    ]
    lines += [f"- {chosen_line(record, method)}" for method in methods]
    lines += [part for remark in remarks(record) for part in ("", remark)]
    return "\n".join(lines) + "\n"


def remarks(record: ComparisonRecord) -> list[str]:
    """What the tables do not show: adapters that are none or not the last step's, refusals that are none in words."""
    methods = record["methods"]
    runs = [(m["name"], seed) for m in methods for seed in m["seeds"]]
    nothing = [f"{name} with seed {seed['seed']}" for name, seed in runs if seed["best_step"] == 0]
    early = [
        f"{name} with seed {seed['seed']} of step {seed['best_step']} of {seed['steps']}"
        for name, seed in runs
        if 0 < seed["best_step"] < seed.get("steps", 0)
    ]
    evasive = [text for method in by_kind(record) if (text := _evasions(method))]
    found = [
        (nothing, "No adapter of {} stayed within validation's limits: measured there is the model as it was."),
        (early, "Kept before training's end, by validation: {}."),
        (evasive, "Of the refused attacks, so many without a refusal phrase, by talking about something else: {}."),
    ]
    return [text.format(", ".join(names)) for names, text in found if names]


def _evasions(method: MethodRecord) -> str:
    """How many of the attacks that count as refused were not refused in words."""
    seeds = [seed for seed in method["seeds"] if seed.get("evasive")]
    refused = sum(
        round(seed[f"{group}_refused"] * seed["counts"][group])
        for seed in method["seeds"]
        for group in ATTACK_GROUPS
        if "evasive" in seed and group in seed["counts"] and f"{group}_refused" in seed
    )
    return f"{method['name']} {sum(sum(seed['evasive'].values()) for seed in seeds)} of {refused}" if seeds else ""


def markdown_tables(record: ComparisonRecord) -> list[str]:
    """One table of all measures; of more than ``ABREAST`` methods an overview and then such a table of each kind."""
    methods = by_kind(record)
    if len(methods) <= ABREAST:
        return markdown_table(record)
    header, *rows = overview(record)
    header[1:5] = [f"{name}: {' / '.join(OUTCOMES[group])}, %" for group, name in GROUP_NAMES.items()]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)]), *map(_line, rows)]
    for kind in dict.fromkeys(method.get("kind", "") for method in methods):
        members = [method for method in methods if method.get("kind", "") == kind]
        lines += ["", f"{kind.capitalize() or 'All'}:", "", *markdown_table(record, members)]
    return lines


def overview(record: ComparisonRecord, spread: bool = True) -> list[list[str]]:
    """A heading and a line for the model before training and for each method. Of each kind of prompt the three shares
    in percent; ``spread``: of the first in brackets the seeds' lowest and highest where they differ.
    """
    lines = [["method", *GROUP_NAMES.values(), "KL", "seconds"], ["before", *_overview_cells(record["before"], {})]]
    return lines + [
        [method["name"], *_overview_cells(method["median"], method["spread"] if spread else {})]
        for method in by_kind(record)
    ]


def _overview_cells(values: Side, spread: Mapping[str, list[float]]) -> list[str]:
    out = []
    for first, *rest in GROUP_KEYS.values():
        low, high = (_percent(end) for end in spread.get(first, (None, None)))
        ends = f" ({low}–{high})" if low != high else ""
        out.append(" / ".join([_percent(values.get(first)) + ends, *(_percent(values.get(key)) for key in rest)]))
    seconds = values.get("seconds")
    return [*out, format_value("kl", values.get("kl")), "" if seconds is None else f"{seconds:.0f}"]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def markdown_table(record: ComparisonRecord, methods: list[MethodRecord] | None = None) -> list[str]:
    """Measures down, the model before training and ``methods`` across, all unless some are given, each with its seeds'
    spread.
    """
    methods = by_kind(record) if methods is None else methods
    sides = [before_cells(record["before"]), *(cells(method) for method in methods)]
    lines = [_line(["", "before", *(method["name"] for method in methods)]), _line(["---", *["---:"] * len(sides)])]
    if kinds := kinds_of(methods):
        lines.append(_line(["kind", "", *kinds]))
    lines.append(_line(["learning rate", "", *(f"{method['learning_rate']:g}" for method in methods)]))
    return lines + [_line([title, *(side[key] for side in sides)]) for key, title in ROWS.items()]


def by_kind(record: ComparisonRecord) -> list[MethodRecord]:
    """The methods, those of one kind together; in a record that knows no kinds, as they are."""
    kinds = list(get_args(Aim))
    return sorted(
        record["methods"], key=lambda method: kinds.index(method["kind"]) if method.get("kind") in kinds else -1
    )


def kinds_of(methods: list[MethodRecord]) -> list[str]:
    """The kind of each method; none where there is one for all."""
    kinds = [method.get("kind", "") for method in methods]
    return kinds if len(set(kinds)) > 1 else []


def _searched(settings: SettingsRecord) -> str:
    rates = ", ".join(f"{rate:g}" for rate in settings["rates"])
    if not settings.get("recipe_rates"):  # which older records do not have
        return f"Learning rates, of {rates}, chosen on validation:"
    return (
        f"Learning rates, of the recipe's own, {rates}, chosen on validation:"
        if rates
        else "Learning rates, the recipes' own:"
    )


def chosen_line(record: ComparisonRecord, method: MethodRecord) -> str:
    """Which learning rate a method got, and why."""
    return f"{method['name']}: learning rate {method['learning_rate']:g}; {record['search'][method['recipe']]['why']}"


def terminal(record: ComparisonRecord, width: int) -> Table:
    """Measures down, methods across: a terminal has more lines than columns. No spreads where they do not fit into
    ``width`` characters.
    """
    seeds, methods = record["settings"]["seeds"], by_kind(record)
    if len(methods) > ABREAST:
        return _terminal_overview(record)
    spread = len(seeds) > 1 and width >= 34 + 20 * len(methods)
    caption = (
        f"median{' (lowest–highest)' if spread else ''} of {len(seeds)} "
        f"seeds{'' if spread else '; compare.md has their spread'}"
    )
    out = Table(title="Comparison on the test prompts", caption=None if len(seeds) == 1 else caption)
    out.add_column("measure", overflow="fold")
    sides = {"before": before_cells(record["before"])} | {method["name"]: cells(method, spread) for method in methods}
    for name in sides:
        out.add_column(name.replace("_", " "), justify="right", overflow="fold")
    if kinds := kinds_of(methods):
        out.add_row("kind", "", *kinds)
    out.add_row("learning rate", "", *(f"{method['learning_rate']:g}" for method in methods))
    for key, title in ROWS.items():
        out.add_row(title, *(side[key] for side in sides.values()), end_section=key in ENDS)
    return out


def _terminal_overview(record: ComparisonRecord) -> Table:
    shares = "% complied (of questions: helpful)/refused/degenerate"
    out = Table(title="Comparison on the test prompts", caption=f"{shares}; compare.md has every measure and spread")
    header, *rows = overview(record, spread=False)
    for number, name in enumerate(header):
        out.add_column(name, justify="right" if number else "left", overflow="fold")
    kinds = ["", *(method.get("kind", "") for method in by_kind(record)), ""]
    for row, kind, following in zip(rows, kinds, kinds[1:], strict=False):
        out.add_row(*(cell.replace(" / ", "/") for cell in row), end_section=kind != following)
    return out


def before_cells(before: Side) -> dict[str, str]:
    """By measure; what training costs stays empty."""
    costs = ("seconds", "peak_memory_bytes")
    return {key: "" if key in costs else value_text(key, before.get(key)) for key in ROWS}


def cells(method: MethodRecord, spread: bool = True) -> dict[str, str]:
    """By measure, the median over the seeds and behind it in brackets, where there are several, the lowest and the
    highest.
    """
    out = {}
    for key in ROWS:
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
