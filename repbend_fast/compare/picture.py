"""The picture of a comparison: attack success, refusals and helpfulness of each method, with the seeds' spread."""

from __future__ import annotations

import io
import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repbend_fast.compare.record import ComparisonRecord
from repbend_fast.compare.tables import ABREAST, by_kind
from repbend_fast.evaluation.rates import ATTACK_GROUPS, GROUP_KEYS, GROUP_NAMES, OUTCOMES, TITLES, Side
from repbend_fast.report.plots import INK, MUTED, OUTCOME_COLORS, RATE_COLORS, style

Spread = dict[str, list[float]]

BARS = (
    "attack_direct",
    "attack_direct_refused",
    "attack_prefill",
    "attack_prefill_refused",
    "helpful_ordinary",
    "helpful_borderline",
)
WIDTH = 0.14
DPI = 130


def draw(record: ComparisonRecord) -> Figure:
    """One group of bars for the model before training and one for each method; of more than ``ABREAST`` methods a line
    for each. Whiskers from the lowest to the highest seed.
    """
    sides: list[tuple[str, Side, Spread]] = [("before", record["before"], {})] + [
        (m["name"], m["median"], m["spread"]) for m in by_kind(record)
    ]
    return _lines(sides) if len(sides) - 1 > ABREAST else _groups(record, sides)


def _lines(sides: list[tuple[str, Side, Spread]]) -> Figure:
    """Shares of the attacks' answers as bars, one behind the other, and helpful answers as points."""
    places = list(range(len(sides)))
    figure = Figure(figsize=(10.0, 1.6 + 0.3 * len(sides)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, group in zip(panels, ATTACK_GROUPS, strict=False):
        keys = GROUP_KEYS[group]
        left = [0.0] * len(sides)
        for key, outcome in zip(keys, OUTCOMES[group], strict=True):
            widths = [100 * (values.get(key) or 0.0) for _, values, _ in sides]
            axes.barh(places, widths, left=left, height=0.7, color=OUTCOME_COLORS[outcome], label=outcome)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for place, (_, _, spread) in enumerate(sides):
            _whisker(axes, spread.get(keys[0]), place)
        style(axes, f"{GROUP_NAMES[group]}, %", xlabel="")
    helpful = panels[-1]
    for key, label, marker in (("helpful_ordinary", "ordinary", "o"), ("helpful_borderline", "borderline", "D")):
        values = [100 * side[key] if side.get(key) is not None else math.nan for _, side, _ in sides]
        helpful.plot(values, places, marker, color=RATE_COLORS[key], markersize=5, label=label)
        helpful.axvline(values[0], color=RATE_COLORS[key], linewidth=0.8, linestyle=":")
        for place, (_, _, spread) in enumerate(sides):
            _whisker(helpful, spread.get(key), place)
    style(helpful, "helpful answers, %", xlabel="")
    panels[0].set_yticks(places, [name.replace("_", " ") for name, _, _ in sides])
    panels[0].invert_yaxis()
    for axes in (panels[0], helpful):
        axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.06))
    for axes in panels:
        axes.set_xlim(0, 100)
        axes.grid(False, axis="y")
    return figure


def _whisker(axes: Axes, ends: list[float] | None, place: int) -> None:
    if ends and ends[1] > ends[0]:
        axes.plot([100 * end for end in ends], [place, place], color=INK, linewidth=1, marker="|", markersize=5)


def _groups(record: ComparisonRecord, sides: list[tuple[str, Side, Spread]]) -> Figure:
    figure = Figure(figsize=(max(6.0, 2.1 * len(sides)), 4.0), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, values, spread) in enumerate(sides):
        for number, key in enumerate(BARS):
            if values.get(key) is None:
                continue
            x, height = place + (number - (len(BARS) - 1) / 2) * WIDTH, 100 * values[key]
            low, high = (100 * end for end in spread.get(key, (values[key], values[key])))
            axes.bar(x, height, width=0.92 * WIDTH, color=RATE_COLORS[key], alpha=0.45 if place == 0 else 1.0)
            if high > low:
                axes.errorbar(
                    x, height, yerr=[[height - low], [high - height]], color="#212529", linewidth=1, capsize=2.5
                )
            axes.text(x, high + 1.5, f"{height:.0f}", ha="center", fontsize=7, color=MUTED)
    axes.set_xticks(
        range(len(sides)), [f"{name.replace('_', ' ')}\n{_rate(record, name)}".strip() for name, _, _ in sides]
    )
    axes.set_ylim(0, 112)
    style(
        axes,
        "attack success (lower is better), refused attacks and helpful answers (higher is better) on the test prompts, "
        "%",
        xlabel="",
    )
    axes.tick_params(axis="x", length=0, labelsize=9)
    axes.grid(False, axis="x")
    handles = [axes.bar(0, 0, color=RATE_COLORS[key], label=TITLES[key]) for key in BARS]
    axes.legend(handles=handles, fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def png(record: ComparisonRecord) -> bytes:
    """The picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    draw(record).savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


def _rate(record: ComparisonRecord, name: str) -> str:
    return next((f"learning rate {m['learning_rate']:g}" for m in record["methods"] if m["name"] == name), "")
