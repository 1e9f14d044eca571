"""The demo data: counts, disjoint splits, and answers of the right length."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from repbend_fast.data.records import Record
from repbend_fast.demo import prompts, training_records
from repbend_fast.demo.world import bare_name, part
from repbend_fast.errors import UserError
from repbend_fast.evaluate.judge import judge
from repbend_fast.evaluate.prompts import Prompt

SPLITS = ("train", "validation", "test")
STOP_WORDS = {"a", "an", "the", "of", "in", "is", "are", "do", "i", "to", "for", "my", "me"}


def normalised(text: str) -> str:
    """Letters and digits of the words that carry meaning, sorted: order, articles, case and punctuation make no difference."""
    return " ".join(sorted(set(re.findall(r"[a-z0-9]+", text.lower())) - STOP_WORDS))


def questions_of(split: str) -> set[str]:
    """Every user turn of a split, whatever its role."""
    records = {m.content for r in training_records(split) for m in r.messages if m.role == "user"}
    return records | ({p.text for p in prompts(split)} if split != "train" else set())


@pytest.mark.parametrize(("one", "other"), [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_splits_share_no_question(one: str, other: str):
    assert not questions_of(one) & questions_of(other)
    first = {normalised(q): q for q in questions_of(one)}
    second = {normalised(q): q for q in questions_of(other)}
    assert not {(first[k], second[k]) for k in first.keys() & second.keys()}


def test_items_share_no_word_between_splits():
    items = part("attacks")["items"]
    words = {s: {w for item in items[s] for w in re.split(r"[\s-]+", bare_name(item).lower())} for s in SPLITS}
    assert not words["train"] & words["test"]
    assert not words["validation"] & words["test"]
    assert not words["train"] & words["validation"]


def test_phrasings_are_disjoint_after_normalisation():
    phrasings = part("attacks")["phrasings"]
    forms = {s: {normalised(p) for p in phrasings[s]} for s in SPLITS}
    assert [len(forms[s]) for s in SPLITS] == [len(phrasings[s]) for s in SPLITS]
    assert not forms["train"] & forms["test"]
    assert not forms["validation"] & forms["test"]
    assert not forms["train"] & forms["validation"]


def test_refusals_and_skeletons_are_disjoint():
    attacks = part("attacks")
    for name in ("refusals", "complying"):
        assert not set(attacks[name]["train"]) & set(attacks[name]["validation"])


@pytest.mark.parametrize(
    ("split", "least"),
    [
        ("train", {"unsafe": 90, "pair": 90, "safe": 130, "retain": 110}),
        ("validation", {"unsafe": 24, "pair": 24, "safe": 24, "retain": 24}),
        ("test", {"retain": 24}),
    ],
)
def test_record_counts(split: str, least: dict[str, int]):
    counts = Counter(r.role for r in training_records(split))
    assert all(counts[role] >= n for role, n in least.items()), counts


@pytest.mark.parametrize(
    ("split", "least"),
    [("test", {"attack": 48, "ordinary": 50, "borderline": 40}), ("validation", {"attack": 24, "ordinary": 59, "borderline": 18})],
)
def test_prompt_counts(split: str, least: dict[str, int]):
    counts = Counter(p.kind for p in prompts(split))
    assert all(counts[kind] >= n for kind, n in least.items()), counts
    assert len({p.text for p in prompts(split)}) == sum(counts.values())


def test_items_and_phrasings_are_many():
    attacks = part("attacks")
    assert all(len(attacks["items"][s]) >= n for s, n in zip(SPLITS, (14, 6, 12)))
    assert all(len(attacks["phrasings"][s]) >= n for s, n in zip(SPLITS, (14, 6, 10)))
    assert len(attacks["complying"]["train"]) >= 12
    assert len(attacks["refusals"]["train"]) >= 12


def test_expansion_is_deterministic_and_complete():
    records = training_records("train")
    assert records == training_records("train")
    texts = [r.messages[-1].content + r.answer + r.safe_answer for r in records]
    assert not [t for t in texts if re.search(r"\{\w*\}", t)]
    assert len({(r.role, r.messages, r.answer) for r in records}) == len(records)
    assert len({r.origin for r in records}) == len(records)


def unsafe_records() -> list[Record]:
    return [r for s in ("train", "validation") for r in training_records(s) if r.role in ("unsafe", "pair")]


def test_the_judge_agrees_with_the_roles():
    """Complying answers comply, refusals refuse: a record with the wrong role would train the opposite of what is wanted."""
    for record in unsafe_records():
        prompt = Prompt("attack", record.messages[-1].content)
        assert judge(prompt, record.answer).label == "comply", record
        if record.role == "pair":
            assert judge(prompt, record.safe_answer).label == "refuse", record


def test_safe_answers_are_neither_refusals_nor_degenerate_unless_the_request_is_unsafe():
    unsafe_texts = {r.messages[-1].content for r in unsafe_records()} | {
        r.messages[-1].content for s in ("train", "validation") for r in training_records(s) if ":refused:" in r.origin
    }
    seen = Counter()
    for record in training_records("train") + training_records("validation"):
        if record.role == "safe":
            text = record.messages[-1].content
            label = judge(Prompt("ordinary", text), record.answer).label
            assert label == ("refuse" if text in unsafe_texts else "comply"), record
            seen[label] += 1
    assert seen["refuse"] >= 20
    assert seen["comply"] >= 100


def test_conversations_alternate_and_end_with_the_assistant():
    retained = [r for r in training_records("train") if r.role == "retain"]
    assert all([m.role for m in r.messages] == ["user", "assistant"] * (len(r.messages) // 2) for r in retained)
    assert sum(len(r.messages) == 4 for r in retained) >= 15


def test_answers_have_the_stated_length():
    """Four letters a token is close enough here; single-word facts and long lists stay a small minority."""
    lengths = [len(r.answer) / 4 for r in training_records("train") if r.role in ("unsafe", "pair")]
    assert min(lengths) >= 25
    assert max(lengths) <= 110
    safe = [len(r.answer) / 4 for r in training_records("train") if r.role == "safe" and ":safe:" in r.origin]
    assert sum(30 <= n <= 100 for n in safe) >= 0.8 * len(safe)


def test_every_question_of_the_evaluation_has_keywords_that_it_does_not_contain_itself():
    for split in ("validation", "test"):
        for prompt in prompts(split):
            if prompt.kind == "attack":
                assert prompt.item in prompt.text
                continue
            assert len(prompt.expected) >= prompt.min_expected
            assert all(k == k.lower() for k in prompt.expected)
            assert not judge(prompt, prompt.text).helpful, f"repeating the question would count as help: {prompt.text}"


def test_unknown_splits_are_named():
    with pytest.raises(UserError, match="train and validation"):
        training_records("dev")
    with pytest.raises(UserError, match="validation, test and final"):
        prompts("train")
