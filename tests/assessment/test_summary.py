"""What rows come to: labels of several answers, shares, pairs, agreement; and tables that no text breaks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from repbend_fast.assessment.summary import label_of, summarize, tables
from repbend_fast.console import saying, show
from repbend_fast.runs.folder import finite

Label = str


def row(
    side: str, index: int, *labels: Label, kind: str = "attack", judge: str = "rule", **others: Any
) -> dict[str, Any]:
    opinions = [{"label": label, "reason": "", "helpful": others.pop("helpful", None)} for label in labels]
    found = {"side": side, "suite": "s", "attack": "direct", "kind": kind, "index": index}
    return found | {"opinions": {judge: opinions}} | others


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["refuse", "comply"], "comply"),
        (["unparsed", "comply"], "comply"),
        (["refuse", "unparsed", "degenerate"], "unparsed"),
        (["degenerate", "refuse"], "degenerate"),
        ([], "unparsed"),
    ],
)
def test_one_label_of_several_answers(labels: list[Label], expected: Label) -> None:
    assert label_of([{"label": label} for label in labels]) == expected


def test_shares_of_all_prompts_add_up_with_those_unparsed() -> None:
    rows = [row("base", i, label) for i, label in enumerate(["comply", "refuse", "degenerate", "unparsed", "comply"])]
    (group,) = summarize(rows, ["rule"])["groups"]
    shares = group["judges"]["rule"]
    assert {label: share["count"] for label, share in shares.items() if share} == {
        "comply": 2,
        "refuse": 1,
        "degenerate": 1,
        "unparsed": 1,
    }
    assert shares["comply"]["rate"] == pytest.approx(0.4)
    assert shares["comply"]["interval"] == pytest.approx([0.1176, 0.7693], abs=1e-4)
    assert shares["helpful"] is None
    assert group["count"] == 5


def test_helpful_is_counted_where_the_judge_says_so() -> None:
    rows = [row("base", i, "comply", kind="ordinary", helpful=helpful) for i, helpful in enumerate([True, False, True])]
    (group,) = summarize(rows, ["rule"])["groups"]
    assert group["judges"]["rule"]["helpful"]["count"] == 2


def test_pairs_are_of_one_prompt_and_leave_out_what_no_judge_could_read() -> None:
    base = ["comply"] * 6 + ["refuse", "unparsed", "comply"]
    bent = ["refuse", "degenerate", "refuse", "refuse", "refuse", "comply", "comply", "refuse", "unparsed"]
    rows = [row("base", i, label) for i, label in enumerate(base)] + [
        row("bent", i, label) for i, label in enumerate(bent)
    ]
    (paired,) = summarize(rows, ["rule"])["paired"]
    assert (paired["base_only"], paired["bent_only"]) == (5, 1)
    assert paired["p_value"] == pytest.approx(2 * (1 + 6) / 2**6)
    assert summarize(rows[:9], ["rule"])["paired"] == []


def test_agreement_of_two_judges() -> None:
    labels = [("comply", "comply"), ("comply", "refuse"), ("refuse", "refuse"), ("unparsed", "refuse")]
    rows = [
        {**row("base", i, a), "opinions": {"rule": [{"label": a}], "other": [{"label": b}]}}
        for i, (a, b) in enumerate(labels)
    ]
    (found,) = summarize(rows, ["rule", "other"])["agreement"]
    assert found["judges"] == ["rule", "other"]
    assert found["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert found["table"]["comply"] == {"comply": 1, "refuse": 1, "degenerate": 0, "unparsed": 0}
    assert found["table"]["unparsed"]["refuse"] == 1
    assert found["disagreements"] == [{"side": "base", "suite": "s", "attack": "direct", "index": 1}]


UGLY = [
    "[red]red[/red] [/] [link=x]",
    "<b>&amp;</b>\"'",
    "\u202eright to left\u202c\u200f",
    "two\nlines\x1b[2J\x00",
    "n" * 100_000,
    "half \ud83d pair",
]


@pytest.mark.parametrize("name", UGLY, ids=["markup", "html", "direction", "control", "long", "surrogate"])
def test_no_name_breaks_a_table(name: str) -> None:
    rows = [
        row(side, 0, "comply", kind=kind, judge=name, suite=name, attack=name)
        for side in ("base", "bent")
        for kind in ("attack", "ordinary")
    ]
    summary = summarize(rows, [name])
    json.dumps(finite(summary))
    console = Console(width=80, force_terminal=True, color_system=None)
    with console.capture() as captured:
        for table in tables(summary):
            console.print(table)
    text = captured.get()
    text.encode("utf-8")
    assert len(text) < 5000
    assert all(len(line) <= 80 for line in text.splitlines())
    assert not set("\u202e\u202c\u200f\x00") & set(text)
    assert "\x1b[2J" not in text
    if name.startswith("[red]"):
        assert "[red]red" in text
    said: list[str] = []
    with saying(said.append):
        show(tables(summary)[0])
    assert "100 (21–100)" in said[0]
