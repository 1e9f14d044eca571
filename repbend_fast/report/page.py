"""Writes ``report.html`` and ``plots/*.png`` of a run."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from repbend_fast.evaluate.rates import KEYS, LOWER_IS_BETTER, RATE_KEYS, TITLES, format_value
from repbend_fast.report.plots import FIGURES
from repbend_fast.report.reading import Row, RunRecord, read_run
from repbend_fast.runs import write_bytes, write_text

GROUP_TITLES = {
    "attack_direct": "Attack requests, asked directly",
    "attack_prefill": "Attack requests, the answer made to begin with “Sure, here is how”",
    "ordinary": "Ordinary questions",
    "borderline": "Borderline questions: harmless, but worded like an attack",
}
CAPTIONS = {
    "before_after": "Attack success should fall, usefulness should stay, degenerate answers should not appear.",
    "shares": "A safe model refuses attacks. Degenerate answers to ordinary questions are the mark of over-bending.",
    "losses": "Each term before its weight, and the weighted sum. A falling sum alone does not say that the model got safer.",
    "distances": "What the terms compare at each hidden state. Where safe and unsafe answers have one each, the safe one should stay dark.",
    "validation": "Measured on held-out data while training; dotted lines are limits. The best adapter within them is kept.",
}
OPEN_SAMPLES = 4
DPI = 130


def write_report(folder: Path) -> Path:
    """Write ``report.html`` (self-contained) and ``plots/*.png`` into a run's folder and return the page's path.

    Parts that the run does not have are left out. Raises ``UserError`` where ``folder`` is no run or cannot be written to.
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


def _content(run: RunRecord, images: Mapping[str, str]) -> dict[str, Any]:
    status, reason = run.status
    return {
        "title": run.folder.resolve().name,
        "model": run.setting("model", "name") or "model unknown",
        "status": status,
        "reason": reason,
        "facts": _facts(run),
        "cards": _cards(run),
        "rows": _rows(run),
        "images": images,
        "captions": CAPTIONS,
        "sample_groups": _sample_groups(run),
        "open_samples": OPEN_SAMPLES,
        "events": [(row["step"], str(row.get("event", "")), str(row.get("reason", ""))) for row in run.events] + _complaints(run),
        "config_text": run.config_text,
    }


def _complaints(run: RunRecord) -> list[tuple[int, str, str]]:
    """What the report itself has to say, as rows of the events' table."""
    return [(run.steps[-1]["step"] if run.steps else 0, "unreadable", run.unreadable)] if run.unreadable else []


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """Short facts for the head of the page."""
    out = [("objective", str(run.setting("objective", "name") or ("repbend" if run.config else "unknown")))]
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


def _verdict(key: str, old: Any, new: Any) -> str:
    """``good``, ``bad`` or ``same``. Perplexity and KL have to rise a little in any bent model, so they are never coloured."""
    if key not in RATE_KEYS or not isinstance(old, int | float) or not isinstance(new, int | float) or abs(new - old) < 1e-3:
        return "same"
    return "good" if (new < old) == (key in LOWER_IS_BETTER) else "bad"


def _rows(run: RunRecord) -> list[Row]:
    """The table of the seven measures; empty where nothing was evaluated."""
    if not run.before and not run.after:
        return []
    counts = run.after.get("counts") or run.before.get("counts") or {}
    return [
        {
            "title": TITLES[key],
            "count": counts.get(key.removeprefix("helpful_").removeprefix("degenerate_"), "") if key in RATE_KEYS else "",
            "before": format_value(key, run.before.get(key)),
            "after": format_value(key, run.after.get(key)),
            "verdict": _verdict(key, run.before.get(key), run.after.get(key)),
        }
        for key in KEYS
    ]


def _cards(run: RunRecord) -> list[Row]:
    """The three numbers that decide whether a run is good."""
    keys = ("attack_direct", "helpful_ordinary", "perplexity")
    return [
        {
            "title": TITLES[key],
            "before": format_value(key, run.before.get(key)),
            "after": format_value(key, run.after.get(key)),
            "verdict": _verdict(key, run.before.get(key), run.after.get(key)),
        }
        for key in keys
        if run.before.get(key) is not None or run.after.get(key) is not None
    ]


def _sample_groups(run: RunRecord) -> list[Row]:
    """Answers by group; the two sides' answers to one prompt stand beside each other."""
    sides = {name: _samples(result) for name, result in (("before", run.before), ("after", run.after))}
    groups = []
    for group, title in GROUP_TITLES.items():
        prompts = dict.fromkeys(prompt for samples in sides.values() for g, prompt in samples if g == group)
        pairs = [{"prompt": prompt} | {name: samples.get((group, prompt)) for name, samples in sides.items()} for prompt in prompts]
        if pairs:
            groups.append({"title": title, "pairs": _spread(pairs)})
    return groups


def _samples(result: Row) -> dict[tuple[str, str], Row]:
    return {
        (str(s.get("group")), str(s.get("prompt"))): {"answer": str(s.get("answer", "")), "label": str(s.get("label", "?"))}
        for s in result.get("samples") or []
        if isinstance(s, Mapping)
    }


def _spread(pairs: list[Row]) -> list[Row]:
    """Pairs reordered so that the first few, which are shown open, come from all over the list."""
    count = min(OPEN_SAMPLES, len(pairs))
    first = [i * len(pairs) // count for i in range(count)]
    return [pairs[i] for i in first] + [pair for i, pair in enumerate(pairs) if i not in first]
