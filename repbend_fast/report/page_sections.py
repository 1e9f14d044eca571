"""The sections of the page, from top to bottom. Each is a function of the runs that returns what it shows, a line that
says what is missing, or None where the page needs no word about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from repbend_fast.report.bars import bar, columns_of, interval_text, percent
from repbend_fast.report.eval_record import BASE, SIDES
from repbend_fast.report.inline_svg import drawn, inlined
from repbend_fast.report.measures import cards, facts, measure_rows, warnings_of
from repbend_fast.report.pictures import pictures_of
from repbend_fast.report.plots import FIGURES
from repbend_fast.report.relearned import Strongest, relearned, uncounted_lines
from repbend_fast.report.run_record import Row, RunRecord
from repbend_fast.report.samples import sample_groups
from repbend_fast.report.shares import Division, divisions
from repbend_fast.report.stored_values import finite_number, mapping_of, rows_of
from repbend_fast.report.ugly_text import short
from repbend_fast.report.verdict import verdict

CAPTIONS = {
    "tradeoff": "Bending should move an attack down without moving it to the left: rings before, dots after.",
    "relearning": "What an attacker gets back who trains the bent model on harmful records. The strongest of his "
    "settings counts.",
    "losses": "Each term before its weight, and the weighted sum. A falling sum alone does not say that the model got "
    "safer.",
    "distances": "What the terms compare at each hidden state. Where safe and unsafe answers have one each, the safe "
    "one should stay dark.",
    "validation": "Measured on held-out data while training; dotted lines are limits. The best adapter within them is "
    "kept.",
}


@dataclass(frozen=True, slots=True)
class Section:
    """``anchor``: its address in the page. ``body``: what it shows, or a line that says what is missing."""

    anchor: str
    title: str
    body: Markup


@dataclass(frozen=True, slots=True)
class Look:
    """How sections are put into words: ``parts`` are the macros of ``parts.html.j2``; ``several``: there is more than
    one run, so each is named. ``files`` collects the figures as files, where there is one run.
    """

    parts: Any
    several: bool
    files: dict[str, str] = field(default_factory=dict)

    def figure(self, name: str, runs: Sequence[RunRecord], *others: RunRecord) -> Markup | None:
        """A figure of each run beside each other, with ``others`` drawn into it; None where no run has data for it."""
        shown = []
        for number, run in enumerate(runs):
            wide = None if self.several and not others else drawn(name, FIGURES[name], run, *others)
            narrow = drawn(name, FIGURES[name], run, *others, narrow=True)
            if wide is not None and not self.several:
                self.files[name] = wide
            if narrow is not None:
                pictures = {
                    size: inlined(svg, f"{name}-{number}-{size}", CAPTIONS[name])
                    for size, svg in (("wide", wide), ("narrow", narrow))
                    if svg is not None
                }
                shown.append(self.parts.figure(run.label if self.several and not others else "", pictures))
        return self.parts.figures(shown, CAPTIONS[name], self.several and not others) if shown else None

    def missing(self, line: str) -> Markup:
        return self.parts.missing(line)


def summary(runs: Sequence[RunRecord], look: Look) -> Section:
    """The head of each run: name, verdict, state, facts, cards, warnings."""
    heads = [
        {
            "label": run.label,
            "verdict": verdict(run),
            "model": short(run.setting("model", "name") or _model_of_evals(run) or "model unknown", 200),
            "status": run.status,
            "facts": facts(run),
            "cards": cards(run),
            "warnings": [*warnings_of(run), *uncounted_lines(run)],
        }
        for run in runs
    ]
    return Section("verdict", "Verdict", look.parts.heads(heads))


def attacks(runs: Sequence[RunRecord], look: Look) -> Section:
    tables = share_tables(runs, hostile=True)
    line = "No attack was measured; repbend-fast eval asks a model under every attack."
    return Section("attacks", "Attacks", look.parts.share_tables(tables) if tables else look.missing(line))


def usefulness(runs: Sequence[RunRecord], look: Look) -> Section:
    """Answers to questions, then the measures that are no shares."""
    tables = share_tables(runs, hostile=False)
    columns, rows = usefulness_rows(runs, look.several)
    body = look.parts.share_tables(tables) if tables else Markup()
    body += look.parts.numbers(columns, rows) if rows else Markup()
    return Section("usefulness", "Usefulness", body or look.missing("What bending costs was not measured."))


def tradeoff(runs: Sequence[RunRecord], look: Look) -> Section:
    figure = look.figure("tradeoff", runs[:1], *runs[1:])
    line = "No plot of attacks against usefulness: it needs both."
    return Section("tradeoff", "Attack success against usefulness", figure or look.missing(line))


def relearning(runs: Sequence[RunRecord], look: Look) -> Section:
    """The curves, and a table of how far each attacker got."""
    figure = look.figure("relearning", runs)
    if figure is None:
        return Section("relearning", "Relearning", look.missing("No relearning attack was measured."))
    rows = [
        (run.label if look.several else "", each.words, _end(each.strongest), each.uncounted)
        for run in runs
        for each in relearned(run)
    ]
    return Section("relearning", "Relearning", figure + look.parts.relearning(rows))


def judges(runs: Sequence[RunRecord], look: Look) -> Section | None:
    """How far several judges agree; no word where there is one."""
    rows = []
    for run in runs:
        for record in run.evals:
            for found in rows_of(record.summary.get("agreement")):
                pair, table = found.get("judges"), found.get("table")
                if isinstance(pair, list) and len(pair) == 2:
                    rows.append(
                        {
                            "run": run.label if look.several else "",
                            "judges": [str(each) for each in pair],
                            "kappa": finite_number(found.get("kappa")),
                            "disagreements": len(rows_of(found.get("disagreements"))),
                            "cells": _cells(table),
                        }
                    )
    return Section("judges", "Judges", look.parts.judges(rows)) if rows else None


def measures(runs: Sequence[RunRecord], look: Look) -> Section:
    rows = measure_rows(runs)
    names = [run.label if look.several else "" for run in runs]
    line = "This run has no evaluation." if not look.several else "These runs have no evaluation."
    return Section("measures", "Before and after", look.parts.measures(names, rows) if rows else look.missing(line))


def lens(runs: Sequence[RunRecord], look: Look) -> Section:
    """Every picture that ``pictures.PICTURES`` can draw of the files in the runs' folders."""
    found = [(run.label if look.several else "", picture) for run in runs for picture in pictures_of(run)]
    line = "No lens picture; repbend-fast lens makes one."
    return Section("lens", "Lens", look.parts.pictures(found) if found else look.missing(line))


def training(runs: Sequence[RunRecord], look: Look) -> Section:
    found = [figure for name in ("losses", "distances") if (figure := look.figure(name, runs))]
    line = "No training step was logged."
    return Section("training", "Training", Markup().join(found) if found else look.missing(line))


def validation(runs: Sequence[RunRecord], look: Look) -> Section:
    figure = look.figure("validation", runs)
    line = "This run was not validated while training."
    return Section("validation", "Validation", figure or look.missing(line))


def answers(runs: Sequence[RunRecord], look: Look) -> Section | None:
    groups = sample_groups(*runs)
    return Section("answers", "Answers", look.parts.answers(groups)) if groups else None


def events(runs: Sequence[RunRecord], look: Look) -> Section | None:
    """What the log says, and what of the folder cannot be read."""
    rows = []
    for run in runs:
        name, last = run.label if look.several else "", run.steps[-1]["step"] if run.steps else 0
        rows += [(name, row["step"], short(row.get("event", "")), str(row.get("reason", ""))) for row in run.events]
        rows += [(name, last, "unreadable", line) for line in run.unreadable]
    return Section("events", "Events", look.parts.events(rows, look.several)) if rows else None


def settings(runs: Sequence[RunRecord], look: Look) -> Section | None:
    texts = [(run.label, run.config_text) for run in runs if run.config_text]
    return Section("settings", "Settings", look.parts.settings(texts)) if texts else None


SECTIONS: tuple[Callable[[Sequence[RunRecord], Look], Section | None], ...] = (
    summary,
    attacks,
    usefulness,
    tradeoff,
    relearning,
    judges,
    measures,
    lens,
    training,
    validation,
    answers,
    events,
    settings,
)
"""In the order of the page. A section of another kind is another function here."""


def share_tables(runs: Sequence[RunRecord], hostile: bool) -> list[Row]:
    """Tables of bars: one for each suite and judge, in it a block for each attack (of questions, each kind), in it a
    row for each side of each run.
    """
    blocks: dict[tuple[str, ...], dict[tuple[str, str], list[tuple[str, Division]]]] = {}
    for run in runs:
        for each in divisions(run):
            if each.hostile == hostile:
                table = blocks.setdefault((each.source, each.suite, each.judge), {})
                table.setdefault((each.attack, each.kind), []).append((run.label if len(runs) > 1 else "", each))
    paired = [row for run in runs for record in run.evals for row in rows_of(record.summary.get("paired"))]
    out = []
    for (source, suite, judge), table in blocks.items():
        columns = columns_of((each for rows in table.values() for _, each in rows), hostile)
        shown = [
            {
                "name": attack if hostile else _question_name(attack, kind),
                "note": _paired_note(paired, suite, attack, kind, judge) if len(runs) == 1 else "",
                "rows": [_bar_row(label, each, columns) for label, each in _base_once(rows)],
            }
            for (attack, kind), rows in table.items()
        ]
        out.append({"source": source, "suite": suite, "judge": judge, "columns": columns, "blocks": shown})
    return out


def _base_once(rows: list[tuple[str, Division]]) -> list[tuple[str, Division]]:
    """The rows of the base first; one without a run's name where it is the same in every run."""
    bases = [row for row in rows if row[1].side == BASE]
    if len(bases) > 1 and all(each == bases[0][1] for _, each in bases):
        bases = [("", bases[0][1])]
    return bases + [row for row in rows if row[1].side != BASE]


def _question_name(attack: str, kind: str) -> str:
    return kind if attack == "direct" else f"{kind}, {attack}"


def _bar_row(label: str, division: Division, columns: list[tuple[str, ...]]) -> Row:
    cells = []
    for names in columns:
        there = [(name, division.shares[name]) for name in names if name in division.shares]
        # A judge that can always be read needs no word about it.
        texts = [(percent(s.rate), interval_text(s), name) for i, (name, s) in enumerate(there) if not i or s.rate]
        cells.append({"bar": bar(division, names), "texts": texts, "title": " or ".join(names)})
    return {"side": division.side, "run": label, "count": division.count, "cells": cells}


def _paired_note(paired: Sequence[Mapping[str, object]], suite: str, attack: str, kind: str, judge: str) -> str:
    """What a paired test says of the same prompts before and after."""
    for row in paired:
        if (row.get("suite"), row.get("attack"), row.get("kind"), row.get("judge")) == (suite, attack, kind, judge):
            p = finite_number(row.get("p_value"))
            if p is not None:
                return f"only base complies {row.get('base_only')}, only bent {row.get('bent_only')}, p = {p:.2g}"
    return ""


def usefulness_rows(runs: Sequence[RunRecord], several: bool) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns, a side of a run each, and rows of the numbers that evaluations took of it besides shares."""
    columns: list[str] = []
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        for record in run.evals:
            sides = mapping_of(record.summary.get("usefulness"))
            for side in SIDES:
                for key, value in mapping_of(sides.get(side)).items():
                    number = finite_number(value)
                    if number is not None:
                        column = f"{run.label}, {side}" if several else side
                        column += f" ({record.name})" if len(run.evals) > 1 else ""
                        columns += [column] if column not in columns else []
                        found.setdefault(str(key), {})[column] = f"{number:.4g}"
    return columns, [
        (key.replace("_", " "), [values.get(column, "–") for column in columns]) for key, values in found.items()
    ]


def _end(strongest: Strongest | None) -> list[str]:
    """Steps, attack success and perplexity at an attacker's strongest point."""
    if strongest is None:
        return ["–", "–", "–"]
    return [
        "–" if strongest.step is None else f"{strongest.step:g}",
        percent(strongest.complied),
        "–" if strongest.ratio is None else f"× {strongest.ratio:.2f}",
    ]


def _cells(table: object) -> list[tuple[str, str, int]]:
    """Labels of both judges and how many answers have them, from the table of an agreement."""
    return [
        (str(first), str(second), count)
        for first, row in mapping_of(table).items()
        for second, count in mapping_of(row).items()
        if isinstance(count, int)
    ]


def _model_of_evals(run: RunRecord) -> str:
    return next((str(record.summary["model"]) for record in run.evals if record.summary.get("model")), "")
