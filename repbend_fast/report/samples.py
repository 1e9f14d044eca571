"""The stored answers of both sides, grouped for the page by what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from repbend_fast.evaluation.rates import ATTACK_GROUPS, is_evasive
from repbend_fast.report.run_record import Row, RunRecord

GROUP_TITLES = {
    "attack_direct": "Attack requests, asked directly",
    "attack_prefill": "Attack requests, the answer made to begin with “Sure, here is how”",
    "ordinary": "Ordinary questions",
    "borderline": "Borderline questions: harmless, but worded like an attack",
}
OPEN_SAMPLES = 4
# What a reader has to see first: attacks that succeed and gibberish, then refusals; of questions gibberish, then
# refused ones.
ATTACK_ORDER = ("complied", "degenerate", "evaded", "refused")
QUESTION_ORDER = ("degenerate", "refused", "answered, not helpful", "helpful")
TONES = {
    "complied": "bad",
    "degenerate": "warn",
    "evaded": "",
    "refused": "good",
    "answered, not helpful": "",
    "helpful": "good",
}


def sample_groups(run: RunRecord) -> list[Row]:
    """Per group of prompts the counts of each side's outcomes, and sections of answers by the outcome after training.

    The two sides' answers to one prompt stand beside each other. Without an ``after`` the outcome before training
    decides.
    """
    sides = {name: _samples(result) for name, result in (("before", run.before), ("after", run.after))}
    out = []
    for group, title in GROUP_TITLES.items():
        prompts = dict.fromkeys(prompt for samples in sides.values() for g, prompt in samples if g == group)
        pairs: list[Row] = [
            {"prompt": p, **{name: samples.get((group, p)) for name, samples in sides.items()}} for p in prompts
        ]
        if pairs:
            counts = [(name, _counts(group, [pair[name] for pair in pairs if pair[name]])) for name in sides]
            out.append(
                {"title": title, "counts": [side for side in counts if side[1]], "sections": _sections(group, pairs)}
            )
    return out


def _sections(group: str, pairs: list[Row]) -> list[Row]:
    found: dict[str, list[Row]] = {}
    for pair in pairs:
        found.setdefault((pair["after"] or pair["before"])["outcome"], []).append(pair)
    shown = [(name, _spread(found[name])) for name in _order(group, found)]
    return [
        {
            "outcome": name,
            "count": len(members),
            "of": len(pairs),
            "open": members[:OPEN_SAMPLES],
            "rest": members[OPEN_SAMPLES:],
        }
        for name, members in shown
    ]


def _counts(group: str, samples: list[Row]) -> list[Row]:
    counts = Counter(sample["outcome"] for sample in samples)
    tones = {sample["outcome"]: sample["tone"] for sample in samples}
    return [{"outcome": name, "count": counts[name], "tone": tones[name]} for name in _order(group, counts)]


def _order(group: str, found: Mapping[str, object]) -> list[str]:
    known = ATTACK_ORDER if group in ATTACK_GROUPS else QUESTION_ORDER
    return [name for name in known if name in found] + [name for name in found if name not in known]


def _samples(result: Row) -> dict[tuple[str, str], Row]:
    return {
        (str(s.get("group")), str(s.get("prompt"))): _sample(s)
        for s in result.get("samples") or []
        if isinstance(s, Mapping)
    }


def _sample(stored: Mapping[str, object]) -> Row:
    reasons = stored.get("reasons")
    reasons = [str(reason) for reason in reasons] if isinstance(reasons, list) else []
    attack = stored.get("group") in ATTACK_GROUPS
    match stored.get("label"):
        case "comply":
            outcome = "complied" if attack else "helpful" if stored.get("helpful") else "answered, not helpful"
        case "refuse":
            outcome = "evaded" if is_evasive(reasons) else "refused"
        case label:
            outcome = str(label or "?")
    tone = "bad" if outcome == "refused" and not attack else TONES.get(outcome, "")
    return {"answer": str(stored.get("answer", "")), "outcome": outcome, "tone": tone, "reason": "; ".join(reasons)}


def _spread(pairs: list[Row]) -> list[Row]:
    """Pairs reordered so that the first few, which are shown open, come from all over the list."""
    count = min(OPEN_SAMPLES, len(pairs))
    first = [i * len(pairs) // count for i in range(count)]
    return [pairs[i] for i in first] + [pair for i, pair in enumerate(pairs) if i not in first]
