"""How the answers of each group divide, before and after bending, whichever file of the run measured it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from repbend_fast.evaluation.rates import ATTACK_GROUPS, GROUP_KEYS
from repbend_fast.evaluation.statistics import wilson
from repbend_fast.report.eval_record import SIDES
from repbend_fast.report.run_record import Row, RunRecord
from repbend_fast.report.stored_values import fraction, mapping_of, rows_of, whole

# Of `evaluation.json`: which attack and kind of prompts a group is. Its judge is the rule judge.
GROUP_OF = {
    "attack_direct": ("direct", "attack"),
    "attack_prefill": ("prefill", "attack"),
    "ordinary": ("direct", "ordinary"),
    "borderline": ("direct", "borderline"),
}
RULE = "rule"
EVALUATION = "evaluation.json"


@dataclass(frozen=True, slots=True)
class Share:
    """A fraction of the answers, with its 95 % interval where the number of answers is known."""

    rate: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Division:
    """One side's answers to the prompts of one kind under one attack, divided by one judge.

    ``source``: the file or the folder in the run's folder that says so. ``side``: ``base`` or ``bent``. ``shares``: by
    outcome, ``complied`` (of questions ``helpful`` and ``answered, not helpful``, or ``answered`` where the judge does
    not say), ``refused``, ``degenerate``, ``unparsed``; they add up to one.
    """

    source: str
    suite: str
    attack: str
    kind: str
    judge: str
    side: str
    count: int | None
    shares: dict[str, Share]

    @property
    def hostile(self) -> bool:
        return self.kind == "attack"

    def rate(self, *outcomes: str) -> float:
        """Of several outcomes together; one that is not there counts as none."""
        return sum(self.shares[name].rate for name in outcomes if name in self.shares)


def interval_of(rate: float, count: int | None) -> tuple[float, float] | None:
    """The interval of a stored rate; None where nothing was counted."""
    return wilson(rate * count, count) if count and count > 0 else None


def outcomes(result: Row, group: str) -> dict[str, float]:
    """How the answers of a group of ``evaluation.json`` divide, as fractions by outcome; empty where its label shares
    were not stored.

    Fluent answers to questions are split by whether they help, where that was measured.
    """
    share = mapping_of(mapping_of(result.get("shares")).get(group))
    if not share:
        return {}
    comply, refused, degenerate = (fraction(share.get(label)) or 0.0 for label in ("comply", "refuse", "degenerate"))
    if group in ATTACK_GROUPS:
        return {"complied": comply, "refused": refused, "degenerate": degenerate}
    helpful = fraction(result.get(GROUP_KEYS[group][0]))
    helpful = comply if helpful is None else min(helpful, comply)
    return {"helpful": helpful, "answered, not helpful": comply - helpful, "refused": refused, "degenerate": degenerate}


def divisions(run: RunRecord) -> list[Division]:
    """Everything that was divided: of ``evaluation.json``, then of each evaluation in the run's folder."""
    suite = str(run.setting("evaluation", "prompts", "path") or "prompts of the run")
    out = []
    for group, (attack, kind) in GROUP_OF.items():
        for side, result in zip(SIDES, (run.before, run.after), strict=True):
            found = outcomes(result, group)
            count = whole(mapping_of(result.get("counts")).get(group))
            shares = {name: Share(rate, interval_of(rate, count)) for name, rate in found.items()}
            if shares:
                out.append(Division(EVALUATION, suite, attack, kind, RULE, side, count, shares))
    for record in run.evals:
        for entry in rows_of(record.summary.get("groups")):
            out += _of_group(record.name, entry)
    return out


def _of_group(source: str, group: Mapping[str, object]) -> list[Division]:
    """One division per judge of an entry in the ``groups`` of ``eval.json``."""
    side, judges, count = group.get("side"), mapping_of(group.get("judges")), whole(group.get("count"))
    if side not in SIDES:
        return []
    suite, attack, kind = (str(group.get(name) or "?") for name in ("suite", "attack", "kind"))
    out = []
    for judge, labels in judges.items():
        shares = _shares(mapping_of(labels), kind, count)
        if shares:
            out.append(Division(source, suite, attack, kind, str(judge), side, count, shares))
    return out


def _shares(labels: Mapping[str, object], kind: str, count: int | None) -> dict[str, Share]:
    comply = _share(labels.get("comply"), count)
    if comply is None:
        return {}
    helpful = _share(labels.get("helpful"), count)
    if kind == "attack":
        out = {"complied": comply}
    elif helpful is None:
        out = {"answered": comply}
    else:
        rest = max(0.0, comply.rate - helpful.rate)
        out = {"helpful": helpful, "answered, not helpful": Share(rest, interval_of(rest, count))}
    for outcome, label in (("refused", "refuse"), ("degenerate", "degenerate"), ("unparsed", "unparsed")):
        share = _share(labels.get(label), count)
        if share is not None:
            out[outcome] = share
    return out


def _share(stored: object, count: int | None) -> Share | None:
    """``{"rate", "interval"}`` as a share, with an interval of ours where it has none that can be read."""
    rate, ends = (mapping_of(stored).get(name) for name in ("rate", "interval"))
    rate = fraction(rate)
    if rate is None:
        return None
    low, high = map(fraction, ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    if low is None or high is None:
        return Share(rate, interval_of(rate, count))
    return Share(rate, (min(low, rate), max(high, rate)))
