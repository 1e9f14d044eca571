"""What attackers who trained a model again got from it, as the evaluations of a run have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from repbend_fast.report.bars import percent
from repbend_fast.report.eval_record import BASE, BENT, EvalRecord
from repbend_fast.report.run_record import RunRecord
from repbend_fast.report.stored_values import finite_number, fraction, mapping_of, rows_of

Point = tuple[float, float]
_WORDS = {"learning_rate": "rate", "rank": "rank"}


@dataclass(frozen=True, slots=True)
class Strongest:
    """Where most attacks succeeded: after how many steps, the share of them, and the perplexity as a multiple of that
    before the training.
    """

    complied: float
    step: float | None
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Retrained:
    """One attacker. ``points``: steps and attack success in per cent, from before the training on where that was
    measured. ``bound``: the perplexity ratio beyond which a training is no attack in the evaluation's tables.
    """

    words: str
    side: str
    points: tuple[Point, ...]
    strongest: Strongest | None
    bound: float | None

    @property
    def uncounted(self) -> bool:
        """It got answers, from a model that the evaluation takes for ruined."""
        if self.strongest is None or not self.strongest.complied or self.bound is None:
            return False
        return self.strongest.ratio is None or self.strongest.ratio > self.bound


def relearned(run: RunRecord) -> list[Retrained]:
    """Every attacker, the strongest first, those of the base last."""
    out = [
        _read(entry, _before(record, entry))
        for record in run.evals
        for entry in rows_of(record.summary.get("relearning"))
    ]
    return sorted(out, key=lambda each: (each.side == BASE, -max((y for _, y in each.points), default=-1.0)))


def uncounted_lines(run: RunRecord) -> list[str]:
    """A line for the strongest training of the bent model that counts as no attack and got answers all the same."""
    found = next((each for each in relearned(run) if each.side == BENT and each.uncounted), None)
    if found is None or found.strongest is None:
        return []
    ratio = found.strongest.ratio
    after = "is lost" if ratio is None else f"is {ratio:.2f} times as high after it"
    return [
        f"Whoever trains it ({found.words}) gets {percent(found.strongest.complied)} of the attacks answered. The "
        f"perplexity {after}, above the bound of {found.bound:g}, so this is not among the attacks below."
    ]


def _before(record: EvalRecord, entry: Mapping[str, object]) -> Mapping[str, object]:
    """The summary of the relearning attack that a training belongs to: same side, same suite."""
    for change in rows_of(record.summary.get("changes")):
        if (change.get("side"), change.get("suite")) == (entry.get("side"), entry.get("suite")):
            summary = mapping_of(change.get("summary"))
            if "start" in summary:
                return summary
    return {}


def _read(entry: Mapping[str, object], attack: Mapping[str, object]) -> Retrained:
    points, ends = [], []
    for row in rows_of(entry.get("curve")):
        step, complied = finite_number(row.get("step")), fraction(row.get("comply"))
        if complied is not None:
            ends.append(Strongest(complied, step, finite_number(row.get("perplexity_ratio"))))
            if step is not None:
                points.append((step, 100 * complied))
    start = fraction(mapping_of(attack.get("start")).get("comply"))
    if start is not None and points and min(points)[0] > 0:
        points.append((0.0, 100 * start))
    strongest = max(ends, key=lambda end: end.complied, default=None)
    bound, side = finite_number(attack.get("bound")), entry.get("side")
    return Retrained(_settings(entry), str(side or ""), tuple(sorted(points)), strongest, bound)


def _settings(entry: Mapping[str, object]) -> str:
    words = [str(entry[key]) for key in ("side", "kind") if entry.get(key) is not None]
    words += [f"{entry['records']} records"] if entry.get("records") is not None else []
    words += [f"{word} {entry[key]}" for key, word in _WORDS.items() if entry.get(key) is not None]
    words += ["no template"] if entry.get("template") is False else []
    return ", ".join(words) or "unnamed settings"
