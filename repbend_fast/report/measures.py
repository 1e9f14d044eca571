"""The numbers of ``evaluation.json``: facts, cards, warnings and the table of all measures before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repbend_fast.evaluation.rates import (
    GROUP_KEYS,
    GROUP_NAMES,
    KEYS,
    LOWER_IS_BETTER,
    RATE_KEYS,
    TITLES,
    format_value,
)
from repbend_fast.objectives.registry import DEFAULT_OBJECTIVE
from repbend_fast.report.bars import percent
from repbend_fast.report.eval_record import BENT
from repbend_fast.report.run_record import Row, RunRecord
from repbend_fast.report.shares import EVALUATION, Division, divisions, outcomes
from repbend_fast.report.stored_values import finite_number, mapping_of
from repbend_fast.report.ugly_text import short

CARD_KEYS = ("attack_direct", "attack_direct_refused", "helpful_ordinary", "perplexity")


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """Short facts for the head of the page."""
    out = [("objective", short(run.setting("objective", "name") or (DEFAULT_OBJECTIVE if run.config else "unknown")))]
    if run.steps:
        out.append(("steps", str(run.steps[-1]["step"])))
    if run.best_step is not None:
        out.append(("kept step", str(run.best_step)))
    seconds = [row["seconds"] for row in run.steps if isinstance(row.get("seconds"), int | float)]
    if seconds:
        out.append(("seconds per step", f"{sorted(seconds)[len(seconds) // 2]:.2f}"))
    speeds = [row["tokens_per_second"] for row in run.steps if isinstance(row.get("tokens_per_second"), int | float)]
    if speeds:
        out.append(("tokens/s", f"{sorted(speeds)[len(speeds) // 2]:,.0f}"))
    peaks = [row["peak_memory_bytes"] for row in run.steps if isinstance(row.get("peak_memory_bytes"), int | float)]
    if peaks and max(peaks) > 0:
        out.append(("peak memory", f"{max(peaks) / 2**30:.2f} GiB"))
    return out


def tone(key: str, old: float | None, new: float | None) -> str:
    """``good``, ``bad`` or ``same``. Perplexity and KL have to rise a little in any bent model, so they are never
    coloured.
    """
    if key not in RATE_KEYS or old is None or new is None or abs(new - old) < 1e-3:
        return "same"
    return "good" if (new < old) == (key in LOWER_IS_BETTER) else "bad"


def measure_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """The table of the measures, two cells for each run; empty where nothing was evaluated."""
    if not any(run.before or run.after for run in runs):
        return []
    counts = next((found for run in runs for side in (run.after, run.before) if (found := _counts(side))), {})
    group_of = {key: group for group, keys in GROUP_KEYS.items() for key in keys}
    first_of_group = {keys[0] for keys in GROUP_KEYS.values()} | {"perplexity"}
    out = []
    for key in KEYS:
        cells = []
        for run in runs:
            old, new = (finite_number(side.get(key)) for side in (run.before, run.after))
            cells += [(format_value(key, old), ""), (format_value(key, new), tone(key, old, new))]
        out.append(
            {
                "title": TITLES[key],
                "count": counts.get(group_of.get(key, ""), ""),
                "first": key in first_of_group,
                "cells": cells,
            }
        )
    return out


def _counts(side: Row) -> Mapping[str, object]:
    return mapping_of(side.get("counts"))


def cards(run: RunRecord) -> list[Row]:
    """The numbers that decide whether a run is good. Attacks that fail on gibberish make none of theirs good."""
    found = outcomes(run.after, "attack_direct")
    babbles = bool(found) and found["degenerate"] > found["refused"]
    sides = {key: [finite_number(side.get(key)) for side in (run.before, run.after)] for key in CARD_KEYS}
    return [
        {
            "title": TITLES[key],
            "before": format_value(key, old),
            "after": format_value(key, new),
            "tone": "same" if babbles and key.startswith("attack") else tone(key, old, new),
        }
        for key, (old, new) in sides.items()
        if old is not None or new is not None
    ]


def warnings_of(run: RunRecord) -> list[str]:
    """A line for each attack that fails on gibberish more often than on refusals: an attack success of 0 % would hide
    that.
    """
    out = []
    for each in divisions(run):
        if each.side == BENT and each.hostile and each.rate("degenerate") > each.rate("refused"):
            shares = f"{percent(each.rate('degenerate'))} degenerate, {percent(each.rate('refused'))} refused"
            out.append(f"The {_attacks(each)} that fail are mostly answered with gibberish, not refused: {shares}.")
    return out


def _attacks(each: Division) -> str:
    if each.source == EVALUATION:
        return GROUP_NAMES[f"attack_{each.attack}"]
    return f"{short(each.attack)} attacks ({short(each.suite)}, judge {short(each.judge)})"
