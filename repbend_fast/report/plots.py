"""The report's figures. Each function returns a figure, or None where the run has nothing to show in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repbend_fast.evaluation.rates import ATTACK_GROUPS, GROUP_KEYS, GROUP_NAMES, OUTCOMES
from repbend_fast.objectives.base import earlier_probes
from repbend_fast.objectives.registry import DEFAULT_OBJECTIVE, section_of, titles_of
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.report.eval_record import BASE, SIDES
from repbend_fast.report.relearned import Point, relearned
from repbend_fast.report.run_record import Row, RunRecord
from repbend_fast.report.shares import divisions
from repbend_fast.report.ugly_text import short
from repbend_fast.report.verdict import decisive

COLORS = {
    "safe": "#2a7f9e",
    "unsafe": "#c8553d",
    "cosine": "#7a5ea8",
    "kl": "#4c956c",
    "pair": "#b08900",
    "refusal": "#3b6ea5",
    "loss": "#30363d",
}
# Of the rates that have a bar of their own; the rest stands in the stacked bars.
RATE_COLORS = {
    "attack_direct": "#c8553d",
    "attack_direct_refused": "#4c956c",
    "attack_prefill": "#e39774",
    "attack_prefill_refused": "#8fbf9f",
    "helpful_ordinary": "#2a7f9e",
    "helpful_borderline": "#7fb7be",
    "degenerate_ordinary": "#d0a23c",
}
# Okabe and Ito's palette: the eight colours that readers with any kind of colour blindness tell apart.
OUTCOME_COLORS = {"complied": "#d55e00", "helpful": "#009e73", "refused": "#0072b2", "degenerate": "#e69f00"}
RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
BEST_COLOR, STOP_COLOR = "#2f9e44", "#c92a2a"
MUTED, INK, LINE, PAPER = "#6c757d", "#212529", "#ced4da", "#ffffff"
WIDE, NARROW = 10.0, 3.4
"""Inches of a figure, of which a page shows about a hundred pixels each."""
MOST_CURVES = 12


def style(axes: Axes, title: str, xlabel: str = "step") -> None:
    """The common look: quiet frame, title on the left."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(xlabel, fontsize=8, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)


def mark_steps(axes: Axes, run: RunRecord) -> None:
    """Vertical lines at the kept step and at the step where the guard stopped training."""
    if run.best_step is not None:
        axes.axvline(run.best_step, color=BEST_COLOR, linewidth=1.4, label=f"kept: step {run.best_step}")
    if run.stop is not None:
        axes.axvline(
            run.stop["step"], color=STOP_COLOR, linewidth=1.4, linestyle="--", label=f"stopped: step {run.stop['step']}"
        )


def numbers(rows: list[Row], *path: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one entry, rows without it left out."""
    steps, values = [], []
    for row in rows:
        value: object = row
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and np.isfinite(value):
            steps.append(row["step"])
            values.append(float(value))
    return steps, values


def _objective(run: RunRecord) -> object:
    """Its name."""
    return run.setting("objective", "name") or DEFAULT_OBJECTIVE


def losses(run: RunRecord, narrow: bool = False) -> Figure | None:
    """One small panel per loss term, and the total."""
    found = {name: None for row in run.steps if isinstance(row.get("terms"), Mapping) for name in row["terms"]}
    titles = {"loss": "total loss", **titles_of(_objective(run))}
    names = sorted(found, key=lambda name: list(titles).index(name) if name in titles else len(titles))
    series = {"loss": numbers(run.steps, "loss")} | {name: numbers(run.steps, "terms", name) for name in names}
    shown = {name: points for name, points in series.items() if points[0] and (name == "loss" or any(points[1]))}
    if not shown:
        return None
    columns = 1 if narrow else min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(NARROW if narrow else WIDE, 2.5 * lines), layout="constrained")
    for place, (name, (steps, values)) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        axes.plot(
            steps,
            values,
            color=COLORS.get(name, COLORS["loss"]),
            linewidth=1.8,
            marker="o" if len(steps) == 1 else None,
        )
        style(axes, short(titles.get(name, name), 36))
        mark_steps(axes, run)
        if place == 1 and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    return figure


Grid = tuple[list[int], list[int], np.ndarray]


def distance_grid(rows: list[Row], name: str, key: str = "distance_per_layer") -> Grid:
    """Steps, layers and distances ``[layers, steps]`` of one term or probe; NaN where a step did not measure a
    layer.
    """
    kept = [row for row in rows if isinstance((row.get(key) or {}).get(name), Mapping)]
    layers = sorted({int(layer) for row in kept for layer in row[key][name]})
    grid = np.full((len(layers), len(kept)), np.nan)
    for column, row in enumerate(kept):
        for layer, value in row[key][name].items():
            grid[layers.index(int(layer)), column] = np.nan if value is None else value
    return [row["step"] for row in kept], layers, grid


def _probes(run: RunRecord) -> tuple[str | None, str | None]:
    """What the objective says is bent and kept, as its validations recorded it; by the terms' names where none did."""
    for row in reversed(run.validations):
        if isinstance(found := row.get("probes"), list) and len(found) == 2:
            return found[0], found[1]
    logged = {name: None for row in run.steps for name in row.get("distance_per_layer") or {}}
    return earlier_probes(list(logged))


def _distance_grids(run: RunRecord) -> tuple[dict[str, Grid], str]:
    """Grids by name, what is kept first, and what their values are: of every step where it has terms of the probes'
    names, else of the validations.
    """
    bent, kept = _probes(run)
    names = [name for name in (kept, bent) if name is not None]
    value = (section_of(_objective(run)) or MethodConfig).layers_title
    found: dict[str, Grid] = {}
    for rows, key, title in (
        (run.steps, "distance_per_layer", value),
        (run.validations, "distance", "distance to the reference, validated"),
    ):
        grids = {name: distance_grid(rows, name, key) for name in names}
        grids = {name: grid for name, grid in grids.items() if grid[1] and np.isfinite(grid[2]).any()}
        if len(grids) > len(found):
            found, value = grids, title
    return found, value


def distances(run: RunRecord, narrow: bool = False) -> Figure | None:
    """Heat maps of what is kept and what is bent, layer by layer and step by step, on one colour scale."""
    grids, title = _distance_grids(run)
    if not grids:
        return None
    top = max(float(np.nanmax(grid[2])) for grid in grids.values()) or 1.0
    rows, columns = (len(grids), 1) if narrow else (1, len(grids))
    figure = Figure(figsize=(NARROW, 2.8 * rows) if narrow else (WIDE, 3.6), layout="constrained")
    image = None
    for place, (stream, (steps, layers, grid)) in enumerate(grids.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        half = (steps[-1] - steps[0]) / max(1, len(steps) - 1) / 2 or 0.5
        extent = (steps[0] - half, steps[-1] + half, layers[0] - 0.5, layers[-1] + 0.5)
        image = axes.imshow(
            grid, aspect="auto", origin="lower", extent=extent, cmap="magma", vmin=0, vmax=top, interpolation="none"
        )
        style(axes, f"{stream}:\n{title}" if narrow else f"{stream} stream: {title}")
        axes.set_ylabel("hidden state", fontsize=8, color=MUTED)
        axes.grid(False)
        if run.best_step is not None and extent[0] <= run.best_step <= extent[1]:
            axes.axvline(run.best_step, color="#69db7c", linewidth=1.4)
    assert image is not None
    figure.colorbar(image, ax=figure.axes, shrink=0.9).ax.tick_params(labelsize=8, colors=MUTED)
    return figure


def validation(run: RunRecord, narrow: bool = False) -> Figure | None:
    """KL, perplexity ratio and rates over the validations, with the guard's limits, the kept step and the stop."""
    limits = {name: run.setting("validation", name) for name in ("max_kl", "max_perplexity_ratio")}
    panels: list[Callable[[Axes], None]] = []
    for key, title, limit in (
        ("kl", "KL per token", "max_kl"),
        ("perplexity_ratio", "perplexity / before", "max_perplexity_ratio"),
    ):
        points = numbers(run.validations, key)
        if points[0]:
            panels.append(lambda axes, p=points, t=title, lim=limits[limit]: _limited(axes, p, t, lim))  # type: ignore[misc]
    attacks, questions = ATTACK_GROUPS, tuple(group for group in GROUP_KEYS if group not in ATTACK_GROUPS)
    for groups, what in ((attacks, "attacks on validation prompts"), (questions, "validation questions")):
        lines = {group: [numbers(run.validations, key) for key in GROUP_KEYS[group]] for group in groups}
        if any(points[0] for found in lines.values() for points in found):
            panels.append(lambda axes, found=lines, t=what: _rates(axes, found, t))  # type: ignore[misc]
    if not panels:
        return None
    columns = 1 if narrow else 2 if len(panels) == 4 else len(panels)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(NARROW, 4.2 * rows) if narrow else (WIDE, 3.5 * rows), layout="constrained")
    for place, draw in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        draw(axes)
        mark_steps(axes, run)
        _legend(axes, narrow)
    return figure


def _limited(axes: Axes, points: tuple[list[int], list[float]], title: str, limit: object) -> None:
    axes.plot(*points, color=COLORS["loss"], linewidth=1.8, marker="o", markersize=4)
    if isinstance(limit, int | float):
        axes.axhline(limit, color=STOP_COLOR, linewidth=1, linestyle=":", label=f"limit {limit:g}")
    style(axes, title)


def _rates(axes: Axes, rates: dict[str, list[tuple[list[int], list[float]]]], title: str) -> None:
    """Lines of the three rates of each group: the outcome by colour, the second group dashed."""
    for (group, lines), dashes in zip(rates.items(), ("-", "--"), strict=True):
        for outcome, (steps, values) in zip(OUTCOMES[group], lines, strict=True):
            if steps:
                label = f"{GROUP_NAMES[group].removesuffix(' attacks')}, {outcome}"
                percent = [100 * v for v in values]
                axes.plot(
                    steps,
                    percent,
                    dashes,
                    color=OUTCOME_COLORS[outcome],
                    linewidth=1.6,
                    marker="o",
                    markersize=3.5,
                    alpha=0.85,
                    label=label,
                )
    axes.set_ylim(-4, 104)
    axes.set_ylabel("%", fontsize=8, color=MUTED)
    style(axes, title)


def tradeoff(run: RunRecord, *others: RunRecord, narrow: bool = False) -> Figure | None:
    """Attack success against usefulness: from a ring before bending to a dot after, one pair for each attack.

    Usefulness is the share of helpful answers to ordinary questions (of answered ones, where no judge says whether they
    help). Of several runs only each one's strongest attack is named.
    """
    found = [(each, costs(each)) for each in (run, *others)]
    found = [(each, points) for each, points in found if points]
    if not found:
        return None
    figure = Figure(figsize=(NARROW, 3.4) if narrow else (6.6, 3.9), layout="constrained")
    axes = figure.add_subplot()
    named: list[tuple[str, Point]] = []
    for (each, points), color in zip(found, cycle(RUN_COLORS)):
        for (_, (x, y)), old in points.values():
            if old is not None:
                axes.plot((old[0], x), (old[1], y), color=color, linewidth=0.8, alpha=0.6)
                axes.plot(*old, "o", markersize=6, markerfacecolor="none", markeredgecolor=color)
            axes.plot(x, y, "o", markersize=6, color=color)
        axes.plot([], [], "o", color=color, label=short(each.label, 40))
        own = sorted((point for point, _ in points.values()), key=lambda point: point[1][1])
        named += own if len(found) == 1 else own[-1:]
    _name_points(axes, sorted(named, key=lambda point: point[1][1]))
    if len(found) > 1:
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), labelcolor=INK)
    axes.set_xlim(-3, 103)
    axes.set_ylim(-5, 105)
    style(axes, "attack success against usefulness", xlabel="ordinary questions answered helpfully, %")
    axes.set_ylabel("attacks that succeed, %", fontsize=8, color=MUTED)
    return figure


def _name_points(axes: Axes, named: list[tuple[str, Point]]) -> None:
    """Labels beside points that are sorted by height, each with a line to its point."""
    heights = spread([y for _, (_, y) in named], min(6.5, 100 / len(named)), 0, 100)
    for (label, (x, y)), height in zip(named, heights, strict=True):
        left = x > 50
        axes.annotate(
            short(label, 24),
            (x, y),
            xytext=(x - 5 if left else x + 5, height),
            fontsize=8,
            color=INK,
            ha="right" if left else "left",
            va="center",
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 1},
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4},
        )


def costs(run: RunRecord) -> dict[tuple[str, ...], tuple[tuple[str, Point], Point | None]]:
    """For each attack its name, where the bent model stands, in per cent of usefulness and of attacks that succeed, and
    where the base stands; empty where either was not measured. Base alone stands for itself. Of several judges the one
    counts that finds the most attacks to succeed.
    """
    found = divisions(run)
    useful = {
        side: 100 * pair[side].rate("helpful", "answered")
        for pair in reversed(decisive([each for each in found if each.kind == "ordinary"]))
        for side in SIDES
        if side in pair
    }
    out: dict[tuple[str, ...], tuple[tuple[str, Point], Point | None]] = {}
    for pair in decisive([each for each in found if each.hostile]):
        places = {side: (useful[side], 100 * pair[side].rate("complied")) for side in pair if side in useful}
        if places:
            last = next(side for side in reversed(SIDES) if side in places)
            key = pair[last].source, pair[last].suite, pair[last].attack
            if key not in out or out[key][0][1][1] < places[last][1]:
                out[key] = ((pair[last].attack, places[last]), places.get(BASE) if last != BASE else None)
    return out


def spread(values: list[float], gap: float, low: float, high: float) -> list[float]:
    """Heights for labels of ascending ``values``: near them, at least ``gap`` apart, from ``low`` to ``high`` as far as
    they fit.
    """
    out: list[float] = []
    for value in values:
        out.append(max(value, out[-1] + gap) if out else max(value, low))
    top = high
    for i in reversed(range(len(out))):
        out[i] = min(out[i], top)
        top = out[i] - gap
    return out


def relearning(run: RunRecord, narrow: bool = False) -> Figure | None:
    """Attack success over the steps of an attacker who trains the bent model again, a line for each of his settings."""
    curves = [(each.words, each.points) for each in relearned(run) if each.points]
    if not curves:
        return None
    rows = len(curves[:MOST_CURVES]) if narrow else -(-len(curves[:MOST_CURVES]) // 2)
    figure = Figure(figsize=(NARROW, 2.6 + 0.2 * rows) if narrow else (6.6, 3.2 + 0.2 * rows), layout="constrained")
    axes = figure.add_subplot()
    for (label, points), color, marker in zip(curves[:MOST_CURVES], cycle(RUN_COLORS), cycle("os^Dv")):
        steps, rates = zip(*points, strict=True)
        axes.plot(steps, rates, color=color, marker=marker, markersize=4, linewidth=1.6, label=short(label, 44))
    axes.set_ylim(-4, 104)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    style(axes, "attack success after relearning", xlabel="the attacker's steps")
    axes.set_ylabel("%", fontsize=8, color=MUTED)
    _legend(axes, narrow)
    return figure


def _legend(axes: Axes, narrow: bool) -> None:
    """Below the axes, so that it hides no line."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize=8,
            handlelength=2.8,
            frameon=False,
            ncols=1 if narrow else 2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            labelcolor=INK,
        )


FIGURES: dict[str, Callable[..., Figure | None]] = {
    "tradeoff": tradeoff,
    "relearning": relearning,
    "losses": losses,
    "distances": distances,
    "validation": validation,
}
"""By name. Each takes a run and ``narrow``, for a page as wide as a phone or a column: panels below each other instead
of beside, with letters as large."""
