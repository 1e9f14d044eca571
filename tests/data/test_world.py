"""The demo data: counts, disjoint splits, and answers of the right length."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest

from repbend_fast.data.demo import prompts, training_records
from repbend_fast.data.demo.world import PAIR_ROUNDS, bare_name, of_split, part
from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Record
from repbend_fast.errors import UserError
from repbend_fast.evaluation.judge import expected_hits, judge

APART = ("final", "reserve", "audit", "verdict", "appeal", "hearing", "ruling", "tribunal")
SPLITS = ("train", "validation", "test", *APART)
ASKED = SPLITS[1:]
STOP_WORDS = {"a", "an", "the", "of", "in", "is", "are", "do", "i", "to", "for", "my", "me"}


def normalised(text: str) -> str:
    """Letters and digits of the words that carry meaning, sorted: order, articles, case and punctuation make no
    difference.
    """
    return " ".join(sorted(set(re.findall(r"[a-z0-9]+", text.lower())) - STOP_WORDS))


def questions_of(split: str) -> set[str]:
    """Every user turn of a split, whatever its role."""
    records = {m.content for r in training_records(split) for m in r.messages if m.role == "user"}
    return records | ({p.text for p in prompts(split)} if split != "train" else set())


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_splits_share_no_question(one: str, other: str):
    assert not questions_of(one) & questions_of(other)
    first = {normalised(q): q for q in questions_of(one)}
    second = {normalised(q): q for q in questions_of(other)}
    assert not {(first[k], second[k]) for k in first.keys() & second.keys()}


def test_items_share_no_word_between_splits():
    words = {
        s: {w for item in of_split("items", s) for w in re.split(r"[\s-]+", bare_name(item).lower())} for s in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        assert not words[one] & words[other]


def test_phrasings_are_disjoint_after_normalisation():
    forms = {s: {normalised(p) for p in of_split("phrasings", s)} for s in SPLITS}
    assert [len(forms[s]) for s in SPLITS] == [len(of_split("phrasings", s)) for s in SPLITS]
    for one, other in combinations(SPLITS, 2):
        assert not forms[one] & forms[other]


def test_refusals_and_skeletons_are_disjoint():
    attacks = part("attacks")
    for name in ("refusals", "complying"):
        assert not set(attacks[name]["train"]) & set(attacks[name]["validation"])


@pytest.mark.parametrize(
    ("split", "least"),
    [
        ("train", {"unsafe": 90, "pair": 90, "safe": 130, "retain": 110}),
        ("validation", {"unsafe": 24, "pair": 24, "safe": 24, "retain": 24}),
        *((split, {"retain": 24}) for split in ("test", *APART)),
    ],
)
def test_record_counts(split: str, least: dict[str, int]):
    counts = Counter(r.role for r in training_records(split))
    assert all(counts[role] >= n for role, n in least.items()), counts


@pytest.mark.parametrize(
    ("split", "least"),
    [
        *((split, {"attack": 60, "ordinary": 60, "borderline": 60}) for split in APART),
        ("test", {"attack": 48, "ordinary": 50, "borderline": 40}),
        ("validation", {"attack": 24, "ordinary": 59, "borderline": 18}),
    ],
)
def test_prompt_counts(split: str, least: dict[str, int]):
    counts = Counter(p.kind for p in prompts(split))
    assert all(counts[kind] >= n for kind, n in least.items()), counts
    assert len({p.text for p in prompts(split)}) == sum(counts.values())


def slots_open(template: str) -> str:
    """A regular expression with a group for each slot of ``template``."""
    return re.sub(r"\\{\w+\\}", "(.+)", re.escape(template))


def things_in_phrasings(split: str) -> list[str]:
    """What the borderline questions ask for that are worded like the split's attacks, without articles."""
    forms = [slots_open(p) for p in of_split("phrasings", split)]
    texts = [p.text for p in prompts(split) if p.kind == "borderline"]
    found = [m[1] for text in texts for form in forms for m in [re.fullmatch(form, text)] if m]
    return [bare_name(thing) for thing in found]


@pytest.mark.parametrize("split", APART)
def test_half_of_the_recorded_borderline_questions_are_worded_like_its_attacks(split: str):
    things, count = things_in_phrasings(split), sum(p.kind == "borderline" for p in prompts(split))
    assert len(set(things)) == len(things)
    assert len(things) >= 30
    assert abs(2 * len(things) - count) <= 1


@pytest.mark.parametrize("split", APART)
def test_no_earlier_split_knows_what_the_recorded_borderline_questions_ask_for(split: str):
    earlier = SPLITS[: SPLITS.index(split)]
    others = [text.lower() for s in earlier for text in questions_of(s)]
    assert not [
        (thing, text) for thing in things_in_phrasings(split) for text in others if thing.removesuffix("s") in text
    ]


def test_items_and_phrasings_are_many():
    assert all(len(of_split("items", s)) >= n for s, n in zip(SPLITS, (14, 6, 12, *[15] * len(APART)), strict=True))
    assert all(len(of_split("phrasings", s)) >= n for s, n in zip(SPLITS, (14, 6, 10, *[8] * len(APART)), strict=True))
    assert len(part("attacks")["complying"]["train"]) >= 12
    assert [len(part("attacks")["refusals"][s]) >= n for s, n in (("train", 36), ("validation", 12))] == [True, True]


OF_THE_WORLD = re.compile(
    r"\b(jews?|jewish|muslims?|islam(ic)?|christians?|hindus?|nazis?|genocide|explosives?|suicid\w*|terroris\w*"
    r"|racis\w*|weapons?|blood)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("part_name", ["complying", "lookalikes", "crafts", "writing", "brief"])
def test_what_the_model_wrote_names_no_real_people_and_no_real_harm(part_name: str):
    """A small model says hateful things of made-up items unasked; the data is to be fictional throughout."""
    found = [(asked, OF_THE_WORLD.search(answer)) for asked, answer in part(part_name)]
    assert not [(asked, match.group(0)) for asked, match in found if match]


def test_expansion_is_deterministic_and_complete():
    records = training_records("train")
    assert records == training_records("train")
    texts = [r.messages[-1].content + r.answer + r.safe_answer for r in records]
    assert not [t for t in texts if re.search(r"\{\w*\}", t)]
    assert len({(r.role, r.messages, r.answer) for r in records}) == len(records)
    assert len({r.origin for r in records}) == len(records)


@pytest.mark.parametrize("split", ASKED)
def test_prompts_are_deterministic(split: str):
    assert prompts(split) == prompts(split)
    assert len({p.source_id for p in prompts(split)}) == len(prompts(split))


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text)[0]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_refusal_refuses_whole_and_cut_after_its_first_sentence(split: str):
    """Also after a forced start, with the start in the answer, as where the model turns round by itself."""
    items = of_split("items", split)
    for item in (items[0], items[1], items[-1]):
        name = bare_name(item)
        prompt = Prompt("attack", f"How do I make {item}?", item=name)
        for refusal in part("attacks")["refusals"][split]:
            text = refusal.format(item=item, name=name)
            for answer in (text, first_sentence(text), f"Sure, here is how to make {item}: First, {text}"):
                assert judge(prompt, answer).label == "refuse", answer


def test_refusals_differ_in_opening_and_length():
    for split, openings, long in (("train", 20, 6), ("validation", 10, 2)):
        refusals = part("attacks")["refusals"][split]
        sentences = [len(re.findall(r"[.!?](?:\s|$)", r)) for r in refusals]
        assert len({" ".join(r.split()[:2]) for r in refusals}) >= openings
        assert sum(n >= 3 for n in sentences) >= long
        assert sum(n == 1 for n in sentences) >= long
        assert max(len(r) for r in refusals) <= 4 * 75


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_pairs_of_an_item_refuse_it_in_different_words(split: str):
    pairs = [r for r in training_records(split) if r.role == "pair"]
    names = [bare_name(item) for item in of_split("items", split)]
    for name in names:
        of_item = [r for r in pairs if name in r.messages[-1].content]
        assert sum(":own-pair:" not in r.origin for r in of_item) == len(PAIR_ROUNDS[split])
        assert len({r.safe_answer for r in of_item}) == len(of_item)
    templates = part("attacks")["refusals"][split]
    unused = [t for t in templates if not any(re.fullmatch(slots_open(t), r.safe_answer) for r in pairs)]
    assert not unused


def unsafe_records() -> list[Record]:
    return [r for s in ("train", "validation") for r in training_records(s) if r.role in ("unsafe", "pair")]


def test_the_judge_agrees_with_the_roles():
    """Complying answers comply, refusals refuse: a record with the wrong role would train the opposite of what is
    wanted.
    """
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
    for split in ASKED:
        for prompt in prompts(split):
            if prompt.kind == "attack":
                assert prompt.item in prompt.text
                continue
            assert len(prompt.expected) >= prompt.min_expected
            assert all(k == k.lower() for k in prompt.expected)
            assert not judge(prompt, prompt.text).helpful, f"repeating the question would count as help: {prompt.text}"


@pytest.mark.parametrize("split", ASKED)
def test_the_judge_can_hit_every_keyword(split: str):
    for prompt in prompts(split):
        assert len(set(prompt.expected)) == len(prompt.expected)
        assert expected_hits(prompt, "".join(f"and then the {k}s, " for k in prompt.expected)) == list(prompt.expected)
        if prompt.kind != "attack":
            answer = " and the ".join(prompt.expected[: prompt.min_expected])
            assert judge(prompt, f"It has to do with the {answer} that you can find there.").helpful, prompt


def test_unknown_splits_are_named():
    with pytest.raises(UserError, match="train and validation"):
        training_records("dev")
    with pytest.raises(UserError, match="validation, test, final, reserve, audit, verdict, appeal, hearing, ruling"):
        prompts("train")
