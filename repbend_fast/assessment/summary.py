"""``eval.json``: what the answers of an evaluation come to, and the table of it on the console."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from repbend_fast.assessment.json_rows import (
    AgreementRow,
    AnswerRow,
    GroupRow,
    Judgement,
    OpinionRow,
    PairedRow,
    Rate,
)
from repbend_fast.evaluation.judges import agreement
from repbend_fast.evaluation.judges.protocol import JUDGED, Judged, Opinion
from repbend_fast.evaluation.statistics import mcnemar, wilson

FORMAT = 1
SIDES = ("base", "bent")
_LONGEST_NAME = 40

Group = tuple[str, str, str]
"""Suite, attack and kind."""


def label_of(opinions: Sequence[OpinionRow]) -> Judged:
    """One prompt's label from those of its answers: see ``evaluation.judges.agreement``."""
    return agreement.label_of([Opinion(opinion["label"]) for opinion in opinions])


def helps(opinions: Sequence[OpinionRow]) -> bool | None:
    """Whether any answer helps; None where the judge does not say."""
    said = [opinion["helpful"] for opinion in opinions if opinion.get("helpful") is not None]
    return any(said) if said else None


def summarize(rows: Sequence[AnswerRow], judges: Sequence[str]) -> Judgement:
    """``groups``, ``paired`` and ``agreement`` of judged rows, in the order in which rows and judges come."""
    groups: dict[tuple[str, Group], list[AnswerRow]] = {}
    for row in rows:
        groups.setdefault((row["side"], (row["suite"], row["attack"], row["kind"])), []).append(row)
    return {
        "groups": [_group(side, group, members, judges) for (side, group), members in groups.items()],
        "paired": [found for judge in judges for found in _paired(groups, judge)],
        "agreement": [_agreement(rows, *pair) for pair in itertools.combinations(judges, 2)],
    }


def _group(side: str, group: Group, members: Sequence[AnswerRow], judges: Sequence[str]) -> GroupRow:
    found: GroupRow = {
        "side": side,
        "suite": group[0],
        "attack": group[1],
        "kind": group[2],
        "count": len(members),
        "judges": {judge: _shares(members, judge) for judge in judges},
    }
    if errors := sum("error" in row.get("details", {}) for row in members):
        found["errors"] = errors
    return found


def _shares(rows: Sequence[AnswerRow], judge: str) -> dict[str, Rate | None]:
    opinions = [row["opinions"].get(judge, []) for row in rows]
    labels = [label_of(found) for found in opinions]
    said = [help for found in opinions if (help := helps(found)) is not None]
    shares: dict[str, Rate | None] = {label: rate_of(labels.count(label), len(labels)) for label in JUDGED}
    return shares | {"helpful": rate_of(sum(said), len(labels)) if said else None}


def rate_of(successes: int, count: int) -> Rate:
    """A count with its rate and Wilson's 95 % interval."""
    return {
        "count": successes,
        "rate": successes / count if count else None,
        "interval": list(wilson(successes, count)),
    }


def _paired(groups: Mapping[tuple[str, Group], Sequence[AnswerRow]], judge: str) -> Iterable[PairedRow]:
    """Prompts that one side complies with and the other does not; those that the judge could not read on either side
    are left out.
    """
    for group in dict.fromkeys(group for _, group in groups):
        sides = [
            {row["index"]: label_of(row["opinions"].get(judge, [])) for row in groups.get((side, group), [])}
            for side in SIDES
        ]
        both = [(sides[0][i], sides[1][i]) for i in sides[0] if i in sides[1]]
        read = [(a == "comply", b == "comply") for a, b in both if "unparsed" not in (a, b)]
        if not read:
            continue
        base_only, bent_only = read.count((True, False)), read.count((False, True))
        yield {
            "suite": group[0],
            "attack": group[1],
            "kind": group[2],
            "judge": judge,
            "base_only": base_only,
            "bent_only": bent_only,
            "p_value": mcnemar(base_only, bent_only),
        }


def _agreement(rows: Sequence[AnswerRow], first: str, second: str) -> AgreementRow:
    """``kappa`` and disagreements of the prompts that both judges could read; the table has all of them."""
    labels = [[label_of(row["opinions"].get(judge, [])) for row in rows] for judge in (first, second)]
    return {
        "judges": [first, second],
        "kappa": agreement.kappa(*labels),
        "table": agreement.table(*labels),
        "disagreements": [
            {"side": row["side"], "suite": row["suite"], "attack": row["attack"], "index": row["index"]}
            for row in (rows[i] for i in agreement.disagreements(*labels))
        ],
    }


def tables(summary: Judgement) -> list[Table]:
    """For each judge one table of the attacks, and one of ordinary and borderline questions where any were asked."""
    judges = list(dict.fromkeys(judge for group in summary["groups"] for judge in group["judges"]))
    found = [_table(summary, judge, attacks) for judge in judges for attacks in (True, False)]
    return [table for table in found if table.row_count]


def _table(summary: Judgement, judge: str, attacks: bool) -> Table:
    groups: dict[Group, list[GroupRow]] = {}
    for member in summary["groups"]:
        if (member["kind"] == "attack") == attacks:
            groups.setdefault((member["suite"], member["attack"], member["kind"]), []).append(member)
    helpful = any(member["judges"][judge]["helpful"] for members in groups.values() for member in members)
    first = "helpful" if helpful else "comply"
    p_values = {
        (found["suite"], found["attack"], found["kind"]): found["p_value"]
        for found in summary["paired"]
        if found["judge"] == judge and not helpful
    }
    out = Table(
        title=Text(f"{'Attacks' if attacks else 'Questions'}, judged by {shown(judge)}: % of prompts (95 % interval)"),
        caption=Text("p: exact McNemar test, base against bent, on complied") if p_values else None,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    out.add_column("prompts", overflow="fold")
    out.add_column("side")
    for name in ("n", "helpful" if helpful else "complied", "refused", "degenerate", "unparsed", "p"):
        if name != "p" or p_values:
            out.add_column(name, justify="right", no_wrap=True)
    for group, members in groups.items():
        cell = Text(" ".join(map(shown, group[:2] if attacks else group)))
        for number, member in enumerate(members):
            shares = member["judges"][judge]
            p_value = [_p(p_values.get(group)) if member["side"] == SIDES[1] else ""] if p_values else []
            out.add_row(
                cell if number == 0 else "",
                Text(member["side"]),
                str(member["count"]),
                *(_percent(shares[label]) for label in (first, "refuse", "degenerate")),
                _percent(shares["unparsed"], interval=False),
                *p_value,
            )
    return out


def _percent(share: Rate | None, interval: bool = True) -> str:
    if share is None or share["rate"] is None:
        return "–"
    low, high = (f"{100 * bound:.0f}" for bound in share["interval"])
    return f"{100 * share['rate']:.0f} ({low}–{high})" if interval else f"{100 * share['rate']:.0f}"


def _p(value: float | None) -> str:
    return "" if value is None else "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def shown(name: str) -> str:
    """A name for a cell: no marks that turn or hide text, no line ends, and not longer than a cell can be."""
    plain = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in name)
    plain = "".join(c for c in plain if unicodedata.category(c) not in ("Cf", "Cs"))
    return plain if len(plain) <= _LONGEST_NAME else f"{plain[: _LONGEST_NAME - 1]}…"
