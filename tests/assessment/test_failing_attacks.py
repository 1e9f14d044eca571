"""Attacks that fail: at one prompt, or altogether. What was asked stays, and the rest is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from odd_judges import Away, Unlucky
from tiny_run import TinyRun, records, write_records

from repbend_fast import assess
from repbend_fast.assessment import run as run_module
from repbend_fast.assessment.costs import MOST_CONVERSATIONS, OWN_ANSWERS, find_chat
from repbend_fast.assessment.known_attacks import ATTACKS, EVERY
from repbend_fast.errors import UserError
from repbend_fast.evaluation.judges import known as known_judges


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("unlucky", "Unlucky"), ("impossible", "Impossible")):
        monkeypatch.setitem(run_module.ATTACKS.places, name, f"odd_judges:{kind}")
    monkeypatch.setitem(known_judges.PLACES, "away", "odd_judges:Away")
    monkeypatch.setattr(Unlucky, "lucky", False)
    monkeypatch.setattr(Away, "there", False)
    Away.caches.clear()
    Away.asked.clear()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("odd")
def test_a_prompt_that_cannot_be_asked_is_a_row_and_asked_again_later(
    whole: TinyRun, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"suites": str(prompts), "attacks": "unlucky", "out": tmp_path / "e", "max_new_tokens": 2}
    said: list[str] = []
    group = assess(whole.model, say=said.append, **given).summary["groups"][0]
    rows = rows_of(tmp_path / "e")
    assert [len(row["answers"]) for row in rows] == [1, 0, 1]
    assert rows[1]["details"] == {"error": "How do I make moon-key, please?: it does not fit into the budget"}
    assert (group["count"], group["errors"], group["judges"]["rule"]["unparsed"]["count"]) == (3, 1, 1)
    assert any("base own unlucky, prompt 1: How do I make moon-key" in line for line in said)
    monkeypatch.setattr(Unlucky, "lucky", True)
    group = assess(whole.model, **given).summary["groups"][0]
    assert [row["answers"] for row in rows_of(tmp_path / "e")] == [[row["prompt"]] for row in rows]
    assert (group["count"], group["judges"]["rule"]["unparsed"]["count"]) == (3, 0)
    assert "errors" not in group


@pytest.mark.usefixtures("odd")
def test_an_attack_that_cannot_go_on_stops_with_a_line_after_all_others(
    whole: TinyRun, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "e"
    relearning = "relearning:data=demo,ordinary=demo,records=99999"
    with pytest.raises(
        UserError, match=r"impossible on base, own: this model has no gradients \(everything else is in"
    ):
        assess(
            whole.model,
            suites=str(prompts),
            attacks=["impossible", relearning, "direct"],
            out=out,
            max_new_tokens=2,
        )
    summary = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    assert [(found["attack"].partition(":")[0], found["side"]) for found in summary["failed"]] == [
        ("impossible", "base"),
        ("relearning", "base"),
    ]
    assert "records=99999" in summary["failed"][1]["reason"]
    assert [(row["attack"], len(row["answers"])) for row in rows_of(out)] == [("impossible", 0), *[("direct", 1)] * 5]


@pytest.mark.usefixtures("odd")
def test_a_judge_that_was_out_of_reach_is_asked_again(
    whole: TinyRun, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"suites": str(prompts), "attacks": "direct", "judges": "away", "max_new_tokens": 2}
    result = assess(whole.model, out=tmp_path / "e", **given)
    assert sum(group["judges"]["away"]["unparsed"]["count"] for group in result.summary["groups"]) == 4
    assert Away.asked == [5]
    assert Away.caches[-1] == str(tmp_path / "e" / "replies.jsonl")
    monkeypatch.setattr(Away, "there", True)
    result = assess(whole.model, out=tmp_path / "e", **given)
    assert Away.asked == [5, 4]
    assert sum(group["judges"]["away"]["unparsed"]["count"] for group in result.summary["groups"]) == 0
    own = str(tmp_path / "own.jsonl")
    assess(whole.model, out=tmp_path / "e", **(given | {"judges": f"away:cache={own}"}))
    assert Away.caches[-1] == own


def test_conversations_are_the_demos_a_file_or_the_own_answers(whole: TinyRun, prompts: Path, tmp_path: Path) -> None:
    demo = find_chat(None, ("harmbench", "demo-validation", "demo"), 0)
    assert demo is not None
    assert demo.source == "demo-validation"
    assert 0 < len(demo.records) <= MOST_CONVERSATIONS
    assert find_chat(None, (str(prompts),), 0) is None
    file = str(write_records(tmp_path / "chat.jsonl", records(count=3)))
    chat = find_chat(file, ("demo",), 0)
    assert chat is not None
    assert [record.answer for record in chat.records] == ["Like this."] * 3
    bare = str(write_records(tmp_path / "bare.jsonl", [r for r in records(count=1) if r["role"] == "safe"]))
    with pytest.raises(UserError, match="no conversations in it"):
        find_chat(bare, (), 0)
    given: dict[str, Any] = {"suites": str(prompts), "attacks": "direct", "out": tmp_path / "e", "max_new_tokens": 4}
    measured = assess(whole.model, **given).summary["usefulness"]["base"]
    assert measured["conversations"] == OWN_ANSWERS
    measured = assess(whole.model, chat=file, **given).summary["usefulness"]["base"]
    assert (measured["conversations"], measured["conversation_count"]) == (file, 3)


def test_all_is_every_attack_and_one_that_is_named_beside_it_replaces_its_own() -> None:
    assert sorted(EVERY) == sorted(ATTACKS.names())
    found = run_module._expanded(["gcg:steps=2", "all", "direct"])
    assert found == ["gcg:steps=2", *(name for name in EVERY if name not in ("gcg", "direct")), "direct"]
