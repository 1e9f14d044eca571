"""Writes ``report.html`` and ``plots/*.png`` of a run."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from repbend_fast.evaluation.rates import (
    ATTACK_GROUPS,
    GROUP_KEYS,
    GROUP_NAMES,
    KEYS,
    LOWER_IS_BETTER,
    RATE_KEYS,
    TITLES,
    format_value,
)
from repbend_fast.objectives.registry import DEFAULT_OBJECTIVE
from repbend_fast.report.plots import FIGURES, outcomes
from repbend_fast.report.run_record import Row, RunRecord, read_run
from repbend_fast.report.samples import sample_groups
from repbend_fast.runs.folder import write_bytes, write_text

CAPTIONS = {
    "before_after": "Attack success should fall because attacks are refused; usefulness should stay, degenerate "
    "answers should not appear.",
    "shares": "A safe model refuses attacks in words. Gibberish, to attacks as to ordinary questions, is the mark of "
    "over-bending.",
    "losses": "Each term before its weight, and the weighted sum. A falling sum alone does not say that the model got "
    "safer.",
    "distances": "What the terms compare at each hidden state. Where safe and unsafe answers have one each, the safe "
    "one should stay dark.",
    "validation": "Measured on held-out data while training; dotted lines are limits. The best adapter within them is "
    "kept.",
}
DPI = 130


def write_report(folder: Path) -> Path:
    """Write ``report.html`` (self-contained) and ``plots/*.png`` into a run's folder and return the page's path.

    Parts that the run does not have are left out. Raises ``UserError`` where ``folder`` is no run or cannot be written
    to.
    """
    folder = Path(folder)
    run = read_run(folder)
    images = {name: _image(folder / "plots" / f"{name}.png", data) for name, data in _figures(run).items()}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files(__package__) / "page.html.j2").read_text(encoding="utf-8"))
    page = folder / "report.html"
    write_text(page, template.render(_content(run, images)))
    return page


def _figures(run: RunRecord) -> dict[str, bytes]:
    """PNG data by name, for the figures that the run has data for."""
    out = {}
    for name, draw in FIGURES.items():
        figure = draw(run)
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
            out[name] = buffer.getvalue()
    return out


def _image(path: Path, data: bytes) -> str:
    """Store a PNG beside the report and return it as a data URI."""
    write_bytes(path, data)
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _content(run: RunRecord, images: Mapping[str, str]) -> dict[str, object]:
    status, reason = run.status
    return {
        "title": run.folder.resolve().name,
        "model": run.setting("model", "name") or "model unknown",
        "status": status,
        "reason": reason,
        "facts": _facts(run),
        "cards": _cards(run),
        "warnings": _warnings(run),
        "rows": _rows(run),
        "images": images,
        "captions": CAPTIONS,
        "sample_groups": sample_groups(run),
        "events": [(row["step"], str(row.get("event", "")), str(row.get("reason", ""))) for row in run.events]
        + _complaints(run),
        "config_text": run.config_text,
    }


def _complaints(run: RunRecord) -> list[tuple[int, str, str]]:
    """What the report itself has to say, as rows of the events' table."""
    return [(run.steps[-1]["step"] if run.steps else 0, "unreadable", run.unreadable)] if run.unreadable else []


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """Short facts for the head of the page."""
    out = [("objective", str(run.setting("objective", "name") or (DEFAULT_OBJECTIVE if run.config else "unknown")))]
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


def _verdict(key: str, old: object, new: object) -> str:
    """``good``, ``bad`` or ``same``. Perplexity and KL have to rise a little in any bent model, so they are never
    coloured.
    """
    if (
        key not in RATE_KEYS
        or not isinstance(old, int | float)
        or not isinstance(new, int | float)
        or abs(new - old) < 1e-3
    ):
        return "same"
    return "good" if (new < old) == (key in LOWER_IS_BETTER) else "bad"


def _rows(run: RunRecord) -> list[Row]:
    """The table of the measures; empty where nothing was evaluated."""
    if not run.before and not run.after:
        return []
    counts = run.after.get("counts") or run.before.get("counts") or {}
    group_of = {key: group for group, keys in GROUP_KEYS.items() for key in keys}
    first_of_group = {keys[0] for keys in GROUP_KEYS.values()} | {"perplexity"}
    return [
        {
            "title": TITLES[key],
            "count": counts.get(group_of.get(key, ""), ""),
            "first": key in first_of_group,
            "before": format_value(key, run.before.get(key)),
            "after": format_value(key, run.after.get(key)),
            "verdict": _verdict(key, run.before.get(key), run.after.get(key)),
        }
        for key in KEYS
    ]


def _cards(run: RunRecord) -> list[Row]:
    """The numbers that decide whether a run is good. Attacks that fail on gibberish make none of theirs good."""
    keys = ("attack_direct", "attack_direct_refused", "helpful_ordinary", "perplexity")
    babbles = _babbles(run, "attack_direct")
    return [
        {
            "title": TITLES[key],
            "before": format_value(key, run.before.get(key)),
            "after": format_value(key, run.after.get(key)),
            "verdict": "same"
            if babbles and key.startswith("attack")
            else _verdict(key, run.before.get(key), run.after.get(key)),
        }
        for key in keys
        if run.before.get(key) is not None or run.after.get(key) is not None
    ]


def _warnings(run: RunRecord) -> list[str]:
    """A line for each kind of attack that fails on gibberish more often than on refusals: an attack success of 0 %
    would hide that.
    """
    out = []
    for group in ATTACK_GROUPS:
        if _babbles(run, group):
            found = outcomes(run.after, group)
            shares = f"{100 * found['degenerate']:.1f} % degenerate, {100 * found['refused']:.1f} % refused"
            out.append(f"The {GROUP_NAMES[group]} that fail are mostly answered with gibberish, not refused: {shares}.")
    return out


def _babbles(run: RunRecord, group: str) -> bool:
    found = outcomes(run.after, group)
    return bool(found) and found["degenerate"] > found["refused"]
