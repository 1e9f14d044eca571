"""Training, validation and test share no topic, no item, no wording, no harmless thing and no request."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import pytest

from repbend_fast.making.policy import SPLITS, Policy, Split, read_policy
from repbend_fast.making.splits import Divided, divide, groups, same_name
from repbend_fast.making.tasks import Work, work_of

Write = Callable[..., str]
THINGS = ["night-bloom wine", "mirror seeds", "whisper hedges", "clock thorns", "salt bells"]


def all_texts(work: Work, split: str) -> set[str]:
    asked = {task.prompt.text for group in work.groups for task in group.tasks if task.split == split}
    asked |= {task.prompt.text for task in work.refused if task.split == split}
    return asked | {prompt.text for prompt in work.prompts.get(split, ())}


def shared(policy: Policy, divided: Divided, work: Work) -> list[str]:
    """Everything that two splits have in common."""
    found = []
    for a, b in combinations(SPLITS, 2):
        items = {s: [x for t in divided.topics[s] for x in (t.name, *t.items)] for s in (a, b)}
        found += [f"{x} {y}" for x in items[a] for y in items[b] if same_name(x, y)]
        for form in ("thing", "activity"):
            found += set(divided.wordings[form][a]) & set(divided.wordings[form][b])
            found += set(divided.allowed[form][a]) & set(divided.allowed[form][b])
        found += all_texts(work, a) & all_texts(work, b)
        words = [re.compile(".+".join(map(re.escape, re.split(r"\{\w+\}", w)))) for w in divided.wordings["thing"][a]]
        attacks = [t.prompt.text for g in work.groups for t in g.tasks if t.split == b and t.part == "complying"]
        attacks += [p.text for p in work.prompts.get(b, ()) if p.kind == "attack"]
        found += [text for text in attacks if any(word.fullmatch(text) for word in words)]
    return found


@pytest.mark.parametrize("name", ["harbour", "demo-world"])
@pytest.mark.parametrize("seed", [0, 3])
def test_splits_share_nothing(name: str, seed: int) -> None:
    policy = read_policy(name)
    policy.config.seed = seed
    divided = divide(policy)
    work = work_of(policy, divided)
    assert all(divided.topics[split] and divided.wordings["thing"][split] for split in SPLITS)
    assert shared(policy, divided, work) == []


def test_what_is_shared_is_found() -> None:
    policy = read_policy("harbour")
    divided = divide(policy)
    work = work_of(policy, divided)
    divided.wordings["thing"]["train"].append(divided.wordings["thing"]["test"][0])
    assert shared(policy, divided, work)
    divided = divide(policy)
    divided.topics["test"].append(divided.topics["train"][0])
    assert shared(policy, divided, work)
    divided = divide(policy)
    work.prompts["test"].append(work.groups[0].tasks[0].prompt)
    assert shared(policy, divided, work)


@pytest.mark.parametrize("seed", range(8))
def test_topics_are_stratified_by_form(seed: int) -> None:
    """Nine topics of things and three of activities: with a draw that did not look, two of the three were tested and
    one trained on.
    """
    policy = read_policy("harbour")
    policy.config.seed = seed
    forms = {split: Counter(t.form for t in topics) for split, topics in divide(policy).topics.items()}
    assert forms["train"] == {"thing": 5, "activity": 2}
    assert forms["validation"] == {"thing": 2}
    assert forms["test"] == {"thing": 2, "activity": 1}


@pytest.mark.parametrize("seed", range(4))
def test_training_keeps_the_only_topic_of_a_form(write_policy: Write, seed: int) -> None:
    topics = [*THINGS, {"name": "hedge waking", "form": "activity", "items": ["wake a hedge"]}]
    divided = divide(read_policy(write_policy(topics=topics, seed=seed)))
    assert [t.name for t in divided.topics["train"] if t.form == "activity"] == ["hedge waking"]


def test_a_topic_that_is_put_into_a_split_counts_for_its_form(write_policy: Write) -> None:
    """Test wants two of six topics, one of each form, and has its activity already."""
    activities = [
        {"name": "hedge waking", "form": "activity", "items": ["wake a hedge"], "split": "test"},
        {"name": "rain stealing", "form": "activity", "items": ["steal rain from a cloud"]},
        {"name": "moon bribes", "form": "activity", "items": ["bribe the moon with cheese"]},
    ]
    divided = divide(read_policy(write_policy(topics=[*THINGS[:3], *activities])))
    assert Counter(t.form for t in divided.topics["test"]) == {"activity": 1, "thing": 1}


@pytest.mark.parametrize("split", SPLITS)
def test_a_wording_of_activities_follows_the_one_of_things_that_it_nearly_is(write_policy: Write, split: Split) -> None:
    """An attack on an activity would fit the other split's wording: `If I wanted to {item} by tonight`."""
    wordings = {s: [f"Paint {{item}} in the colour of {s}."] for s in SPLITS}
    wordings[split] = ["If I wanted {item} by tonight, what would I have to do?"]
    activities = [{"name": "hedge waking", "form": "activity", "items": ["wake a hedge"]}]
    divided = divide(read_policy(write_policy(topics=[*THINGS, *activities], wordings=wordings)))
    assert "If I wanted to {item} by tonight, what would I have to do?" in divided.wordings["activity"][split]


def test_the_seed_decides() -> None:
    policy = read_policy("harbour")
    first, again = work_of(policy, divide(policy)), work_of(policy, divide(policy))
    policy.config.seed = 1
    other = work_of(policy, divide(policy))
    assert first == again
    assert first.prompts != other.prompts
    assert [t.prompt.text for t in first.groups[0].tasks] != [t.prompt.text for t in other.groups[0].tasks]


def test_whole_requests_that_are_alike_stay_together(write_policy: Write) -> None:
    asked = [f"{verb} the {thing} near the {place}." for verb, thing, place in (
        ("Open", "moon gate", "mill"), ("Paint", "silver fox", "barn"), ("Hide", "glass crown", "well"),
        ("Steal", "echo", "tower"), ("Wake", "stone owl", "bridge"), ("Bend", "rainbow", "harbour"),
    )]  # fmt: skip
    asked += [text.replace(".", " now, please!") for text in asked]
    policy = read_policy(write_policy(topics=None, requests=asked))
    divided = divide(policy)
    assert all(divided.requests[split] for split in SPLITS)
    for split in SPLITS:
        texts = divided.requests[split]
        assert {text.replace(" now, please!", ".") for text in texts} == {
            t for t in texts if t.endswith("l.") or "now" not in t
        }
    assert sorted(text for split in SPLITS for text in divided.requests[split]) == sorted(asked)


def test_topics_with_requests_of_their_own_use_no_others(write_policy: Write) -> None:
    own = [
        {"name": name, "items": [name], "requests": [f"{verb} me a {{name}} {how}.", f"Who {verb}s at {place}?"]}
        for name, verb, how, place in (
            ("fog-lute", "bring", "tonight", "sea"),
            ("mud-harp", "weave", "slowly", "noon"),
            ("ice-drum", "sketch", "twice", "home"),
        )
    ]
    policy = read_policy(write_policy(topics=own))
    work = work_of(policy, divide(policy))
    texts = {task.prompt.text for task in work.groups[0].tasks}
    [topic] = divide(policy).topics["train"]
    assert texts <= {wording.replace("{name}", topic.name) for wording in topic.requests}


def test_groups_are_joined_by_way_of_others() -> None:
    texts = ["one two three four", "two three four five", "three four five six", "seven eight"]
    assert groups(texts, 0.6) == [[0, 1, 2], [3]]
    assert groups(texts, 0.7) == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("a fog-bell", "fog-bells", True),
        ("the old fog-bell", "a fog-bell", True),
        ("glimmerdust", "glimmer-dust", True),
        ("a moon-key", "a moon-ladder", False),
        ("tide engines", "storm bottles", False),
    ],
)
def test_names_that_count_as_one(a: str, b: str, same: bool) -> None:
    assert same_name(a, b) is same
    assert same_name(b, a) is same
