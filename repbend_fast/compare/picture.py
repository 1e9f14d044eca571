"""The picture of a comparison: attack success, refusals and helpfulness of each method, with the seeds' spread."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from repbend_fast.compare.record import ComparisonRecord
from repbend_fast.evaluation.rates import TITLES, Side
from repbend_fast.report.plots import MUTED, RATE_COLORS, style

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
    """One group of bars for the model before training and one for each method; whiskers from the lowest to the highest
    seed.
    """
    before = record["before"]
    sides: list[tuple[str, Side, dict[str, list[float]]]] = [("before", before, {})] + [
        (m["name"], m["median"], m["spread"]) for m in record["methods"]
    ]
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
