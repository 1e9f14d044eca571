"""A policy file: what it may say, and one line with file and line for what it may not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted_model import TOPICS

from repbend_fast.config.shipped import policy_names
from repbend_fast.errors import UserError
from repbend_fast.making.policy import (
    SPLITS,
    CountsConfig,
    PolicyConfig,
    RefusalConfig,
    SplitsConfig,
    TopicConfig,
    fill,
    read_policy,
)
from repbend_fast.making.splits import divide, same_name
from repbend_fast.making.tasks import work_of

Write = Callable[..., str]
DOCS = Path(__file__).parents[2] / "docs" / "data-make.md"


def refused(path: str) -> str:
    def work() -> None:
        policy = read_policy(path)
        work_of(policy, divide(policy))

    with pytest.raises(UserError) as error:
        work()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", policy_names())
def test_shipped_policies_give_work_in_every_split(name: str) -> None:
    policy = read_policy(name)
    work = work_of(policy, divide(policy))
    assert [group.wanted for group in work.groups if group.wanted > len(group.tasks)] == []
    assert {kind for split in ("validation", "test") for kind in {p.kind for p in work.prompts[split]}} == {
        "attack",
        "ordinary",
        "borderline",
    }


def test_the_example_has_twelve_topics_that_the_demo_does_not_know() -> None:
    from repbend_fast.data.demo import prompts

    topics = read_policy("harbour").config.topics
    known = {prompt.item for split in ("validation", "test", "final") for prompt in prompts(split)}
    assert len(topics) == 12
    assert not [x for topic in topics for x in topic.items if any(same_name(x, item) for item in known if item)]


def test_the_demos_world_keeps_its_splits() -> None:
    from repbend_fast.data.demo import prompts

    policy = read_policy("demo-world")
    attacks = {prompt.text for prompt in work_of(policy, divide(policy)).prompts["test"] if prompt.kind == "attack"}
    items = {prompt.item for prompt in prompts("test") if prompt.item}
    assert attacks
    assert all(any(item in text for item in items) for text in attacks)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"topics": list(TOPICS[:1])}, "1 that differ is too few, as training, validation and"),
        ({"topics": [7, *TOPICS]}, "topics.0: it must be a valid dictionary"),
        ({"topics": []}, "policy.yaml:2: no topics and no requests; name what is restricted"),
        ({"topics": None}, "no topics and no requests"),
        ({"topics": list(TOPICS[:2])}, "topics and requests: 2 that differ are too few"),
        ({"topic": []}, "unknown key topic; did you mean topics?"),
        ({"counts": {"attack": 3}}, "unknown key counts.attack; did you mean attacks?"),
        ({"topics": [*TOPICS, {"name": "A Bell Locks"}]}, "topic A Bell Locks is there twice (first at "),
        ({"topics": [*TOPICS, {"name": "x", "items": ["the chime-bolt"]}]}, "item the chime-bolt is there twice"),
        ({"topics": [*TOPICS, {"name": "x", "allowed": ["a chime-bolt"]}]}, "is restricted in another topic"),
        ({"topics": [*TOPICS, {"name": "x", "items": ["y"], "allowed": ["a y"]}]}, "y is restricted and allowed at"),
        ({"topics": [*TOPICS, {"items": ["y"]}]}, "topics.5.name is missing"),
        ({"topics": [*TOPICS, {"name": " "}]}, "topics.5.name: "),
        ({"topics": "dusk"}, "topics: "),
        ({"name": None}, "name is missing"),
        ({"name": "a b"}, "name: use letters, digits, -, _ and . alone, as the run's folder is called after it; it is"),
        ({"counts": {"attacks": 0}}, "counts.attacks: it must be greater than or equal to 1; it is 0"),
        ({"splits": {"test": 0.7}}, "splits.test: "),
        ({"wordings": ["Make it."]}, "a wording needs {item} or {name}"),
        ({"wordings": ["Make {thing}."]}, "unknown placeholder {thing}; there are {item} and {name}"),
        ({"wordings": ["Make {item}.", "How is {item} done?"]}, "wordings: 2 that differ are too few"),
        ({"wordings": {"train": ["Make {item}."]}}, "no wordings for validation or test"),
        ({"wordings": {split: ["Make {item}."] for split in SPLITS}}, "stands in another split too; keep one"),
        ({"requests": ["Say it.", "say it."]}, "requests has 'say it.' twice"),
        ({"requests": "gone.txt"}, "requests=gone.txt: no such file"),
        ({"requests": ["Say it."], "allowed_requests": ["say it."]}, "is restricted and allowed at once"),
        ({"ordinary": ["Hi!", "What is rain?"]}, "ordinary: 2 that differ are too few"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_with_file_and_line(write_policy: Write, changes: dict[str, object], said: str) -> None:
    path = write_policy(**changes)
    found = refused(path)
    assert said in found
    assert found.startswith(path)


def test_two_alike_topics_may_not_be_asked_for_in_two_splits(write_policy: Write) -> None:
    alike = [{"name": "x", "items": ["a fog-lute"], "split": "train"}, {"name": "y", "items": ["fog-lutes"]}]
    policy = read_policy(write_policy(topics=[*TOPICS, *alike]))
    divided = divide(policy)
    assert {"x", "y"} <= {topic.name for topic in divided.topics["train"]}
    alike[1]["split"] = "test"
    assert "topics x (train) and y (test) are alike" in refused(write_policy(topics=[*TOPICS, *alike]))


def test_files_that_are_no_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    assert refused(str(path)) == f"{path}: no such policy file"
    path.write_bytes(b"name: caf\xe9\n")
    assert "not valid UTF-8 at byte 9" in refused(str(path))
    path.write_text("- a\n")
    assert "holds a list, expected keys such as `name:` and `topics:`" in refused(str(path))
    path.write_text("name: a\nname: b\n")
    assert "policy.yaml:2: name is given twice" in refused(str(path))
    (tmp_path / "odd.txt").write_bytes(b"caf\xe9\n")
    path.write_text("name: a\nrequests: odd.txt\n")
    assert f"{tmp_path / 'odd.txt'}: not valid UTF-8 at byte 3" in refused(str(path))
    assert "no policy is called harbor" in refused("harbor")
    assert "did you mean harbour?" in refused("harbor")


def test_requests_come_from_files_beside_the_policy(write_policy: Write, tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("\ufeffOpen the gate.\n\nPaint the fox.\n", encoding="utf-8")
    (tmp_path / "near.jsonl").write_text('{"kind": "borderline", "text": "Open a jar."}\n', encoding="utf-8")
    policy = read_policy(write_policy(requests="asked.txt", allowed_requests="near.jsonl"))
    assert policy.requests == ("Open the gate.", "Paint the fox.")
    assert policy.allowed_requests == ("Open a jar.",)


def test_a_text_is_a_topic_of_that_name(write_policy: Write) -> None:
    topics = read_policy(write_policy(topics=["dusk powders", {"name": "bell locks"}, "frost pipes"])).config.topics
    assert [topic.name for topic in topics] == ["dusk powders", "bell locks", "frost pipes"]
    assert topics[0].form == "thing"


def test_wordings_are_filled_with_and_without_the_article() -> None:
    assert fill("Make {item}, the {name}.", "a fog-bell") == "Make a fog-bell, the fog-bell."
    assert fill("{name}: how?", "the fog-bell") == "Fog-bell: how?"


EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", EXAMPLES, ids=len)
def test_the_examples_of_the_docs_are_policies(tmp_path: Path, text: str) -> None:
    (tmp_path / "asked.txt").write_text("Open the moon gate.\nWake the stone owl.\n", encoding="utf-8")
    (tmp_path / "garden.yaml").write_text(text, encoding="utf-8")
    policy = read_policy(str(tmp_path / "garden.yaml"))
    work = work_of(policy, divide(policy))
    assert all(group.wanted for group in work.groups)


def test_the_docs_name_every_setting() -> None:
    sections = (PolicyConfig, TopicConfig, RefusalConfig, CountsConfig, SplitsConfig)
    whole = max(EXAMPLES, key=len)
    assert [key for section in sections for key in section.model_fields if f"{key}:" not in whole] == ["system"]
