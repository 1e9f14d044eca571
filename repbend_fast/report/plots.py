"""The report's figures. Each function returns a figure, or None where the run has nothing to show in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repbend_fast.evaluation.rates import ATTACK_GROUPS, GROUP_KEYS, GROUP_NAMES
from repbend_fast.objectives.base import earlier_probes
from repbend_fast.objectives.registry import DEFAULT_OBJECTIVE, section_of, titles_of
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.report.run_record import Row, RunRecord

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
OUTCOME_COLORS = {
    "complied": "#c8553d",
    "helpful": "#2a7f9e",
    "answered, not helpful": "#8d99ae",
    "refused": "#4c956c",
    "degenerate": "#d0a23c",
}
BEST_COLOR, STOP_COLOR, MUTED = "#2f9e44", "#c92a2a", "#6c757d"


def style(axes: Axes, title: str, xlabel: str = "step") -> None:
    """The common look: quiet frame, title on the left."""
    axes.set_title(title, loc="left", fontsize=10, color="#212529")
    axes.set_xlabel(xlabel, fontsize=8, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#ced4da")


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


def losses(run: RunRecord) -> Figure | None:
    """One small panel per loss term, and the total."""
    found = {name: None for row in run.steps if isinstance(row.get("terms"), Mapping) for name in row["terms"]}
    titles = {"loss": "total loss", **titles_of(_objective(run))}
    names = sorted(found, key=lambda name: list(titles).index(name) if name in titles else len(titles))
    series = {"loss": numbers(run.steps, "loss")} | {name: numbers(run.steps, "terms", name) for name in names}
    shown = {name: points for name, points in series.items() if points[0] and (name == "loss" or any(points[1]))}
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(10, 2.5 * lines), layout="constrained")
    for place, (name, (steps, values)) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        axes.plot(
            steps,
            values,
            color=COLORS.get(name, COLORS["loss"]),
            linewidth=1.8,
            marker="o" if len(steps) == 1 else None,
        )
        style(axes, titles.get(name, name))
        mark_steps(axes, run)
        if place == 1 and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False)
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


def distances(run: RunRecord) -> Figure | None:
    """Heat maps of what is kept and what is bent, layer by layer and step by step, on one colour scale."""
    grids, title = _distance_grids(run)
    if not grids:
        return None
    top = max(float(np.nanmax(grid[2])) for grid in grids.values()) or 1.0
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    image = None
    for place, (stream, (steps, layers, grid)) in enumerate(grids.items(), 1):
        axes = figure.add_subplot(1, len(grids), place)
        half = (steps[-1] - steps[0]) / max(1, len(steps) - 1) / 2 or 0.5
        extent = (steps[0] - half, steps[-1] + half, layers[0] - 0.5, layers[-1] + 0.5)
        image = axes.imshow(
            grid, aspect="auto", origin="lower", extent=extent, cmap="magma", vmin=0, vmax=top, interpolation="nearest"
        )
        style(axes, f"{stream} stream: {title}")
        axes.set_ylabel("hidden state", fontsize=8, color=MUTED)
        axes.grid(False)
        if run.best_step is not None and extent[0] <= run.best_step <= extent[1]:
            axes.axvline(run.best_step, color="#69db7c", linewidth=1.4)
    assert image is not None
    figure.colorbar(image, ax=figure.axes, shrink=0.9).ax.tick_params(labelsize=8, colors=MUTED)
    return figure


def validation(run: RunRecord) -> Figure | None:
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
    for groups, what, first in (
        (attacks, "attacks on validation prompts", "complied"),
        (questions, "validation questions", "helpful"),
    ):
        lines = {group: [numbers(run.validations, key) for key in GROUP_KEYS[group]] for group in groups}
        if any(points[0] for found in lines.values() for points in found):
            panels.append(lambda axes, found=lines, t=what, f=first: _rates(axes, found, t, f))  # type: ignore[misc]
    if not panels:
        return None
    figure = Figure(figsize=(10 if len(panels) < 4 else 13, 3.9), layout="constrained")
    for place, draw in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        draw(axes)
        mark_steps(axes, run)
        axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def _limited(axes: Axes, points: tuple[list[int], list[float]], title: str, limit: object) -> None:
    axes.plot(*points, color=COLORS["loss"], linewidth=1.8, marker="o", markersize=4)
    if isinstance(limit, int | float):
        axes.axhline(limit, color=STOP_COLOR, linewidth=1, linestyle=":", label=f"limit {limit:g}")
    style(axes, title)


def _rates(axes: Axes, rates: dict[str, list[tuple[list[int], list[float]]]], title: str, first: str) -> None:
    """Lines of the three rates of each group: the outcome by colour, the second group dashed."""
    for (group, lines), dashes in zip(rates.items(), ("-", "--"), strict=True):
        for outcome, (steps, values) in zip((first, "refused", "degenerate"), lines, strict=True):
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


def before_after(run: RunRecord) -> Figure | None:
    """Bars of the rates that decide, before and after."""
    keys = [
        key
        for key in RATE_COLORS
        if isinstance(run.before.get(key), int | float) or isinstance(run.after.get(key), int | float)
    ]
    if not keys:
        return None
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(keys))
    for shift, side, rates, alpha in ((-0.2, "before", run.before, 0.35), (0.2, "after", run.after, 1.0)):
        shown = [
            (x + shift, 100 * rates[key], RATE_COLORS[key])
            for x, key in zip(places, keys, strict=True)
            if rates.get(key) is not None
        ]
        for x, height, color in shown:
            axes.bar(x, height, width=0.38, color=color, alpha=alpha)
            axes.text(x, height + 1.5, f"{height:.0f} %", ha="center", fontsize=8, color="#212529")
        for x, _, _ in shown:
            axes.text(x, -3, side, ha="center", va="top", fontsize=7, color=MUTED)
    axes.set_xticks(places, [_bar_name(key) for key in keys])
    axes.set_ylim(0, 112)
    style(axes, "before and after, on held-out requests", xlabel="")
    axes.tick_params(axis="x", length=0, pad=14, labelsize=9)
    axes.grid(False, axis="x")
    return figure


def _bar_name(key: str) -> str:
    """``attack_direct_refused`` as two lines that fit under a bar."""
    first, _, rest = key.replace("attack_prefill", "attack_prefilled").partition("_")
    return f"{first}\n{rest.replace('_', ', ')}"


def outcomes(result: Row, group: str) -> dict[str, float]:
    """How the answers of a group divide, as fractions by outcome; empty where its label shares were not stored.

    Fluent answers to questions are split by whether they help, where that was measured.
    """
    share = (result.get("shares") or {}).get(group)
    if not isinstance(share, Mapping):
        return {}
    comply, refused, degenerate = (float(share.get(label) or 0.0) for label in ("comply", "refuse", "degenerate"))
    if group in ATTACK_GROUPS:
        return {"complied": comply, "refused": refused, "degenerate": degenerate}
    helpful = result.get(GROUP_KEYS[group][0])
    helpful = min(float(helpful), comply) if isinstance(helpful, int | float) else comply
    return {"helpful": helpful, "answered, not helpful": comply - helpful, "refused": refused, "degenerate": degenerate}


def shares(run: RunRecord) -> Figure | None:
    """Stacked bars of each group, before and after: what was given, what was refused, what was no language."""
    rows = [
        (f"{GROUP_NAMES[group]}, {side}", found)
        for group in GROUP_KEYS
        for side, result in (("before", run.before), ("after", run.after))
        if (found := outcomes(result, group))
    ]
    if not rows:
        return None
    figure = Figure(figsize=(10, 0.8 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, found) in enumerate(rows):
        left = 0.0
        for outcome, share in found.items():
            width = 100 * share
            axes.barh(place, width, left=left, color=OUTCOME_COLORS[outcome], height=0.72)
            if width >= 6:
                axes.text(
                    left + width / 2, place, f"{width:.0f} %", ha="center", va="center", fontsize=8, color="white"
                )
            left += width
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    style(axes, "answers by outcome", xlabel="% of answers")
    axes.grid(False)
    shown = [name for name in OUTCOME_COLORS if any(found.get(name) for _, found in rows)]
    handles = [axes.barh(0, 0, color=OUTCOME_COLORS[name], label=name) for name in shown]
    axes.legend(
        handles=handles, fontsize=8, frameon=False, ncols=len(handles) or 1, loc="lower right", bbox_to_anchor=(1, 1)
    )
    return figure


FIGURES: dict[str, Callable[[RunRecord], Figure | None]] = {
    "before_after": before_after,
    "shares": shares,
    "losses": losses,
    "distances": distances,
    "validation": validation,
}
