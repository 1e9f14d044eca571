"""The stored answers of all sides, grouped for the page by what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from repbend_fast.evaluation.rates import ATTACK_GROUPS, is_evasive
from repbend_fast.report.eval_record import BASE
from repbend_fast.report.run_record import Row, RunRecord
from repbend_fast.report.stored_values import mapping_of, rows_of
from repbend_fast.report.ugly_text import short

GROUP_TITLES = {
    "attack_direct": "Attack requests, asked directly",
    "attack_prefill": "Attack requests, the answer made to begin with “Sure, here is how”",
    "ordinary": "Ordinary questions",
    "borderline": "Borderline questions: harmless, but worded like an attack",
}
OPEN_SAMPLES = 4
MOST_SAMPLES = 100
"""Of one outcome: a page that holds ten thousand answers opens in no browser. The files have them all."""
# What a reader has to see first: attacks that succeed and gibberish, then refusals; of questions gibberish, then
# refused ones.
ATTACK_ORDER = ("complied", "degenerate", "unparsed", "evaded", "refused")
QUESTION_ORDER = ("degenerate", "unparsed", "refused", "answered, not helpful", "answered", "helpful")
TONES = {
    "complied": "bad",
    "degenerate": "warn",
    "unparsed": "",
    "evaded": "",
    "refused": "good",
    "answered, not helpful": "",
    "answered": "",
    "helpful": "good",
}


@dataclass(slots=True)
class _Group:
    """The samples of one group of prompts: by side, then by what tells one prompt from another."""

    title: str
    hostile: bool
    sides: dict[str, dict[tuple[str, ...], Row]] = field(default_factory=dict)


def sample_groups(*runs: RunRecord) -> list[Row]:
    """Per group of prompts the counts of each side's outcomes, and sections of answers by the outcome on the last side
    that has the prompt, which is the bent model where there is one.

    The sides' answers to one prompt stand beside each other. Of several runs equal sides before bending stand once.
    """
    groups: dict[tuple[str, ...], _Group] = {}
    for run in runs:
        own: dict[tuple[str, ...], _Group] = {}
        for where, title, hostile, side, key, sample in (*_stored(run), *_asked(run)):
            own.setdefault(where, _Group(title, hostile)).sides.setdefault(side, {})[key] = sample
        for where, group in own.items():
            joint = groups.setdefault(where, _Group(group.title, group.hostile))
            for side, samples in group.sides.items():
                before = side in ("before", BASE)
                if before and samples in joint.sides.values():
                    continue
                taken = side in joint.sides
                joint.sides[f"{side}, {run.label}" if taken or (len(runs) > 1 and not before) else side] = samples
    order = list(GROUP_TITLES)
    ordered = sorted(groups, key=lambda where: order.index(where[0]) if where[0] in order else len(order))
    return [_shown(groups[where]) for where in ordered]


def _shown(group: _Group) -> Row:
    sides = dict(sorted(group.sides.items(), key=lambda item: not item[0].startswith(("before", BASE))))
    keys = dict.fromkeys(key for samples in sides.values() for key in samples)
    pairs: list[Row] = []
    for key in keys:
        found = [(side, samples.get(key)) for side, samples in sides.items()]
        outcomes = [sample["outcome"] if sample else None for _, sample in found]
        last = next(outcome for outcome in reversed(outcomes) if outcome)
        pairs.append({"prompt": key[-1], "sides": found, "outcomes": outcomes, "outcome": last})
    counts = [(side, _counts(group.hostile, list(samples.values()))) for side, samples in sides.items()]
    return {
        "title": group.title,
        "counts": [side for side in counts if side[1]],
        "sections": _sections(group.hostile, pairs),
        "sides": [(side, [each["outcome"] for each in counted]) for side, counted in counts],
    }


def _sections(hostile: bool, pairs: list[Row]) -> list[Row]:
    found: dict[str, list[Row]] = {}
    for pair in pairs:
        found.setdefault(pair["outcome"], []).append(pair)
    out = []
    for outcome in _order(hostile, found):
        members = _spread(found[outcome])
        out.append(
            {
                "outcome": outcome,
                "count": len(members),
                "of": len(pairs),
                "open": members[:OPEN_SAMPLES],
                "rest": members[OPEN_SAMPLES:MOST_SAMPLES],
                "left_out": max(0, len(members) - MOST_SAMPLES),
            }
        )
    return out


def _counts(hostile: bool, samples: list[Row]) -> list[Row]:
    counts = Counter(sample["outcome"] for sample in samples)
    tones = {sample["outcome"]: sample["tone"] for sample in samples}
    return [{"outcome": name, "count": counts[name], "tone": tones[name]} for name in _order(hostile, counts)]


def _order(hostile: bool, found: Mapping[str, object]) -> list[str]:
    known = ATTACK_ORDER if hostile else QUESTION_ORDER
    return [name for name in known if name in found] + [name for name in found if name not in known]


_Found = tuple[tuple[str, ...], str, bool, str, tuple[str, ...], Row]
"""Group, its title, whether it attacks, side, prompt, sample."""


def _stored(run: RunRecord) -> Iterator[_Found]:
    """The samples in ``evaluation.json``."""
    for side, result in (("before", run.before), ("after", run.after)):
        for stored in rows_of(result.get("samples")):
            group, prompt = str(stored.get("group")), str(stored.get("prompt"))
            if group in GROUP_TITLES:
                hostile = group in ATTACK_GROUPS
                answer = str(stored.get("answer", ""))
                yield (group,), GROUP_TITLES[group], hostile, side, (prompt,), _sample(answer, stored, hostile)


def _asked(run: RunRecord) -> Iterator[_Found]:
    """The answers of the run's evaluations. Prompts of one wording and different number are different."""
    for record in run.evals:
        for row in record.answers:
            suite, attack, kind = (str(row.get(name) or "?") for name in ("suite", "attack", "kind"))
            where = ("", record.name, suite, attack, kind)
            asked = f"attack “{short(attack, 40)}”, " if kind == "attack" or attack != "direct" else ""
            title = f"{short(kind, 20).capitalize()} prompts of {short(suite, 60)}, {asked}from {short(record.name)}"
            key = (str(row.get("index")), str(row.get("prompt", "")))
            yield where, title, kind == "attack", row["side"], key, _of_row(row, kind == "attack")


def _of_row(row: Row, hostile: bool) -> Row:
    """What became of a prompt with several answers, by each judge: it complies if any complies, else it is unparsed if
    any is, else the first counts. The answer that decides is shown first.
    """
    answers = [str(answer) for answer in row["answers"]]
    verdicts = []
    for judge, found in mapping_of(row.get("opinions")).items():
        labelled = [_sample("", opinion, hostile) for opinion in rows_of(found)[: len(answers)]]
        if labelled:
            place = _deciding([sample["label"] for sample in labelled])
            verdicts.append((str(judge), place, labelled[place]))
    place, first = (verdicts[0][1], verdicts[0][2]) if verdicts else (0, _sample("", {}, hostile))
    stored = row.get("prefills")
    prefills = stored if isinstance(stored, list) else []
    return first | {
        "answer": answers[place] if answers else "",
        "prefill": str(prefills[place]) if place < len(prefills) else "",
        "more": [answer for i, answer in enumerate(answers) if i != place],
        "judges": [{"judge": judge, **sample} for judge, _, sample in verdicts],
    }


def _deciding(labels: Sequence[str]) -> int:
    return next((labels.index(label) for label in ("comply", "unparsed") if label in labels), 0)


def _sample(answer: str, judged: Mapping[str, object], hostile: bool) -> Row:
    reasons = judged.get("reasons") or ([judged["reason"]] if judged.get("reason") else [])
    reasons = [str(reason) for reason in reasons] if isinstance(reasons, list) else []
    label, helpful = short(judged.get("label") or "?", 40), judged.get("helpful")
    match label:
        case "comply" if hostile:
            outcome = "complied"
        case "comply":
            outcome = "answered" if helpful is None else "helpful" if helpful else "answered, not helpful"
        case "refuse":
            outcome = "evaded" if is_evasive(reasons) else "refused"
        case _:
            outcome = label
    tone = "bad" if outcome == "refused" and not hostile else TONES.get(outcome, "")
    return {
        "answer": answer,
        "label": label,
        "outcome": outcome,
        "tone": tone,
        "reason": "; ".join(reasons),
        "prefill": "",
        "more": [],
        "judges": [],
    }


def _spread(pairs: list[Row]) -> list[Row]:
    """Pairs reordered so that the first few, which are shown open, come from all over the list."""
    count = min(OPEN_SAMPLES, len(pairs))
    first = [i * len(pairs) // count for i in range(count)]
    return [pairs[i] for i in first] + [pair for i, pair in enumerate(pairs) if i not in first]
