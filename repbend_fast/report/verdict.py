"""The verdict on a run in one sentence that names both costs: what attacks still get, and what usefulness is left."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from repbend_fast.report.bars import percent
from repbend_fast.report.eval_record import BENT, SIDES
from repbend_fast.report.run_record import RunRecord
from repbend_fast.report.shares import EVALUATION, Division, divisions
from repbend_fast.report.stored_values import finite_number, mapping_of
from repbend_fast.report.ugly_text import name

Pair = dict[str, Division]
"""The two sides of what was asked in the same way; one may be missing."""


def verdict(run: RunRecord) -> Markup:
    """The strongest attack that was measured, before and after, by every judge; then what usefulness was measured."""
    found = divisions(run)
    attacks = decisive([each for each in found if each.hostile])
    questions = decisive([each for each in found if not each.hostile])
    return Markup("{}; {}.").format(_attacks(attacks), _usefulness(questions, run))


def decisive(found: list[Division]) -> list[Pair]:
    """What counts: the run's evaluations, which ask more and with larger budgets, else ``evaluation.json``."""
    return list(pairs_of([each for each in found if each.source != EVALUATION] or found).values())


def pairs_of(found: Iterable[Division]) -> dict[tuple[str, ...], Pair]:
    """Divisions by source, suite, attack, kind and judge, with their sides together."""
    out: dict[tuple[str, ...], Pair] = {}
    for each in found:
        out.setdefault((each.source, each.suite, each.attack, each.kind, each.judge), {})[each.side] = each
    return out


def _attacks(hostile: list[Pair]) -> Markup:
    if not hostile:
        return Markup("No attack was measured")
    side = next(side for side in reversed(SIDES) if any(side in pair for pair in hostile))
    strongest = max((pair[side] for pair in hostile if side in pair), key=lambda each: each.rate("complied"))
    same = [
        pair
        for pair in hostile
        if side in pair
        and (pair[side].source, pair[side].suite, pair[side].attack)
        == (strongest.source, strongest.suite, strongest.attack)
    ]
    same.sort(key=lambda pair: pair[side] is not strongest)
    rates = Markup(" and ").join(_change(pair, "complied", judge=len(same) > 1) for pair in same)
    attacks = len({pair[side].attack for pair in hostile if side in pair})
    start = Markup("The strongest of {} attacks, ").format(attacks) if attacks > 1 else Markup("The one attack, ")
    when = "" if side == BENT else " before bending"
    count = f" of {strongest.count} requests" if strongest.count else " of the requests"
    return start + Markup("{}, succeeds{} on {}{}").format(name(strongest.attack), when, rates, count)


def _usefulness(pairs: list[Pair], run: RunRecord) -> Markup:
    parts = []
    for kind, outcomes, words in (
        ("ordinary", ("helpful", "answered"), "of ordinary questions {} are answered{}"),
        ("borderline", ("refused",), "of harmless borderline questions {} are refused"),
    ):
        # An attack on questions is none; the plain way of asking is what usefulness means.
        asked = [pair for pair in pairs if next(iter(pair.values())).kind == kind]
        pair = next((p for p in asked if next(iter(p.values())).attack == "direct"), asked[0] if asked else None)
        if pair:
            shown = pair.get(BENT) or next(iter(pair.values()))
            outcome = next((each for each in outcomes if each in shown.shares), outcomes[0])
            helpfully = " helpfully" if outcome == "helpful" else ""
            parts.append(Markup(words).format(_change(pair, outcome), helpfully))
    ratio = perplexity_ratio(run)
    if ratio is not None:
        parts.append(Markup("perplexity is {} times that of the base").format(f"{ratio:.2f}"))
    return Markup(", ").join(parts) if parts else Markup("what it costs in usefulness was not measured")


def _change(pair: Pair, outcome: str, judge: bool = False) -> Markup:
    """``2.1 % (before 91.7 %)``, of one side alone its rate."""
    old, new = (pair[side].rate(outcome) if side in pair else None for side in SIDES)
    by = Markup(" by {}").format(name(next(iter(pair.values())).judge)) if judge else ""
    if new is None or old is None:
        return Markup("<strong>{}</strong>{}").format(percent(old if new is None else new), by)  # type: ignore[arg-type]
    return Markup("<strong>{}</strong>{} (before {})").format(percent(new), by, percent(old))


def perplexity_ratio(run: RunRecord) -> float | None:
    """Of the bent model to the base, from an evaluation or from ``evaluation.json``."""
    for record in run.evals:
        bent = mapping_of(mapping_of(record.summary.get("usefulness")).get(BENT))
        ratio = finite_number(bent.get("perplexity_ratio"))
        if ratio is not None:
            return ratio
    old, new = finite_number(run.before.get("perplexity")), finite_number(run.after.get("perplexity"))
    return new / old if old and new is not None else None
