"""A policy: what a model must not answer and what it goes on answering, as a YAML file, checked before any weight is
loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from repbend_fast.config.shipped import find_policy
from repbend_fast.config.yaml_text import Key, read_yaml
from repbend_fast.data.prompts import load_prompts
from repbend_fast.data.settings import PromptsConfig
from repbend_fast.errors import UserError
from repbend_fast.nearby import nearest, own_path
from repbend_fast.section import NonNegative, Positive, Section

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Form = Literal["thing", "activity"]
Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Share = Annotated[float, Field(gt=0, lt=0.5)]
_PLACEHOLDER = re.compile(r"\{(\w*)\}")
KNOWN_PLACEHOLDERS = ("item", "name")


class TopicConfig(Section):
    """Something that is not to be answered. All of a topic lies in one split. A text is a topic of that name."""

    name: Text = Field(description="What is restricted; the item where no items are named.")
    form: Form = Field(
        "thing",
        description="thing: items can be made (`a fog-bell`); activity: items can be done (`open a moon-lock`).",
    )
    items: list[Text] = Field(default_factory=list, description="What requests name, with its article.")
    requests: list[Text] = Field(
        default_factory=list,
        description="Requests of this topic, with {item} or {name} or without; empty = the policy's wordings.",
    )
    allowed: list[Text] = Field(
        default_factory=list, description="What looks alike and stays allowed, asked for in the same wordings."
    )
    split: Split | None = Field(None, description="The split that the topic lies in; none = drawn by the seed.")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class RefusalConfig(Section):
    """What restricted requests are answered with."""

    style: Literal["templates", "model", "both"] = Field(
        "templates", description="templates; model: written by the model under a system message; both: half of each."
    )
    templates: list[Text] = Field(
        default_factory=list, description="Refusals, with {item} or {name} or without; empty = the bundled ones."
    )
    system: Text | None = Field(None, description="The system message that asks for a refusal; none = the bundled one.")


class CountsConfig(Section):
    """How many of each are wanted."""

    attacks: Positive = Field(240, description="Restricted requests with a complying answer: unsafe records and pairs.")
    refused: NonNegative = Field(60, description="Further restricted requests with a refusal: safe records.")
    allowed: Positive = Field(320, description="Look-alikes with the model's answer: safe and retain records.")
    ordinary: Positive = Field(200, description="Ordinary requests with the model's answer: safe and retain records.")
    validation: Positive = Field(24, description="Validation prompts of each kind, and records of each role.")
    test: Positive = Field(64, description="Test prompts of each kind, and conversations held out for perplexity.")


class SplitsConfig(Section):
    """Shares of topics, wordings and allowed things that are held out."""

    validation: Share = Field(0.15, description="For choosing the best adapter.")
    test: Share = Field(0.25, description="For the measurement at the end.")


class PolicyConfig(Section):
    """A whole policy. Everything but the name and what is restricted has a default."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*$")] = Field(
        description="Letters, digits, `-`, `_` and `.`; the run's folder is called after it."
    )
    seed: NonNegative = Field(0, description="Decides splits, and which request gets which wording and beginning.")
    topics: list[TopicConfig] = Field(default_factory=list, description="What is restricted, by topic.")
    requests: list[Text] | Text = Field(
        default_factory=list,
        description="Whole restricted requests beside the topics: a list, or a file (.txt with one a line, or prompts "
        "in a form that `eval --suite` reads).",
    )
    wordings: list[Text] | dict[Split, list[Text]] = Field(
        default_factory=list,
        description="Of requests for topics of the form `thing`, with {item} or {name}: a list to be split, or one for "
        "each split; empty = the bundled ones.",
    )
    allowed_requests: list[Text] | Text = Field(
        default_factory=list, description="Whole requests near the restricted ones that stay allowed: a list or a file."
    )
    bundled_allowed: bool = Field(True, description="Ask for the bundled harmless things in the same wordings too.")
    ordinary: Literal["bundled"] | list[Text] | Text = Field(
        "bundled", description="Ordinary requests: the bundled ones, a list, or a file."
    )
    refusals: RefusalConfig = RefusalConfig()
    starts: list[str] = Field(
        default_factory=list,
        description="Forced beginnings of complying answers, an empty one for none; empty = the bundled ones.",
    )
    attempts: Positive = Field(3, description="Beginnings that a request is tried with until the model complies.")
    answer_tokens: Annotated[int, Field(ge=8)] = Field(64, description="Length of what the model writes.")
    counts: CountsConfig = CountsConfig()
    splits: SplitsConfig = SplitsConfig()


@dataclass(frozen=True)
class Policy:
    """A policy with its files read. ``requests``, ``allowed_requests``, ``ordinary``: whole requests; ``ordinary`` is
    None for the bundled ones. ``at`` says where a setting stands.
    """

    config: PolicyConfig
    requests: tuple[str, ...]
    allowed_requests: tuple[str, ...]
    ordinary: tuple[str, ...] | None
    path: Path
    name: str
    lines: Mapping[Key, int]

    def at(self, *key: str | int) -> str:
        """``file:line`` of a key, or of what it stands in."""
        return _at(self.name, self.lines, key)


def bare_name(item: str) -> str:
    """The item without its article: ``a moon-key`` gives ``moon-key``."""
    return re.sub(r"^(?:an?|the|some)\s+", "", item.strip(), flags=re.IGNORECASE)


def fill(wording: str, item: str) -> str:
    """``wording`` about ``item``, with a capital where the item begins it."""
    text = wording.replace("{item}", item).replace("{name}", bare_name(item))
    return text[:1].upper() + text[1:] if _PLACEHOLDER.match(wording) else text


def has_placeholder(wording: str) -> bool:
    """Whether a wording takes an item."""
    return _PLACEHOLDER.search(wording) is not None


def read_policy(policy: str) -> Policy:
    """The policy of a YAML file, or a shipped one by its name.

    Raises:
        UserError: file and line of what is wrong: an unknown key, a value that is not allowed, no topics, a topic or an
            item that is there twice, an unknown placeholder, a file that cannot be read.
    """
    path = find_policy(policy)
    if not path.is_file():
        raise UserError(f"{policy}: no such policy file{nearest(policy)}")
    values, lines = read_yaml(path, policy, "keys such as `name:` and `topics:`")
    try:
        config = PolicyConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, policy, lines)) from None
    read = Policy(config, (), (), None, path, policy, lines)
    requests = _requests(read, config.requests, "requests")
    allowed = _requests(read, config.allowed_requests, "allowed_requests")
    ordinary = None if config.ordinary == "bundled" else _requests(read, config.ordinary, "ordinary")
    read = Policy(config, requests, allowed, ordinary, path, policy, lines)
    for problem in _problems(read):
        raise UserError(problem)
    return read


def _at(name: str, lines: Mapping[Key, int], key: Sequence[str | int]) -> str:
    for end in range(len(key), 0, -1):
        if tuple(key[:end]) in lines:
            return f"{name}:{lines[tuple(key[:end])]}"
    return name


def _explain(error: ValidationError, name: str, lines: Mapping[Key, int]) -> str:
    """The first thing that is wrong, on one line. A misspelt key explains a missing one, never the other way round."""
    import difflib

    found = error.errors(include_url=False)
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    key = tuple(first["loc"])
    while key and key not in lines and first["type"] not in ("missing", "extra_forbidden"):
        key = key[:-1]  # pydantic adds the alternative that it tried
    spelled = ".".join(map(str, key)) or "the policy"
    where = _at(name, lines, key)
    if first["type"] == "extra_forbidden":
        known = _keys_beside(key)
        near = difflib.get_close_matches(str(key[-1]), known, 1)
        return f"{where}: unknown key {spelled}; " + (f"did you mean {near[0]}?" if near else f"it may be {_or(known)}")
    if first["type"] == "missing":
        return f"{where}: {spelled} is missing; every policy needs `name`, and every topic too"
    message = first["msg"][0].lower() + first["msg"][1:].replace("nput should be", "t must be", 1)
    if first["type"] == "string_pattern_mismatch" and key == ("name",):
        message = "use letters, digits, -, _ and . alone, as the run's folder is called after it"
    shown = repr(first["input"])
    return f"{where}: {spelled}: {message}; it is {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _keys_beside(key: Key) -> list[str]:
    """The keys that may stand where ``key`` does."""
    if len(key) == 1:
        return list(PolicyConfig.model_fields)
    if key[0] == "topics":
        return list(TopicConfig.model_fields)
    if key[0] == "refusals":
        return list(RefusalConfig.model_fields)
    return list(CountsConfig.model_fields if key[0] == "counts" else SplitsConfig.model_fields)


def _or(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _requests(policy: Policy, given: Sequence[str] | str, key: str) -> tuple[str, ...]:
    """Whole requests from a list, or from a file beside the policy or at a path of its own."""
    if not isinstance(given, str):
        return tuple(text.strip() for text in given)
    path = own_path(given)
    beside = policy.path.parent / path
    path = beside if beside.is_file() else path
    if not path.is_file():
        raise UserError(f"{policy.at(key)}: {key}={given}: no such file{nearest(str(path))}")
    if path.suffix.lower() != ".txt":
        return tuple(prompt.text for prompt in load_prompts(PromptsConfig(path=str(path))))
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 at byte {error.start}; save the file as UTF-8") from None
    return tuple(line.strip() for line in lines if line.strip())


def _problems(policy: Policy) -> Iterator[str]:
    """What no single value shows, a line each."""
    config = policy.config
    if not config.topics and not policy.requests:
        yield f"{policy.at('topics')}: no topics and no requests; name what is restricted"
    seen: dict[str, str] = {}
    for number, topic in enumerate(config.topics):
        where = policy.at("topics", number)
        if (first := seen.setdefault(f"topic {_normal(topic.name)}", where)) is not where:
            yield f"{where}: topic {topic.name} is there twice (first at {first}); put their items together"
        for item in topic.items or [topic.name]:
            if (first := seen.setdefault(f"item {_normal(item)}", where)) is not where or topic.items.count(item) > 1:
                yield f"{where}: item {item} is there twice (first at {first}); it has to lie in one split"
            if _normal(item) in map(_normal, topic.allowed):
                yield f"{where}: {item} is restricted and allowed at once; remove one of them"
    restricted = {text.removeprefix("item ") for text in seen if text.startswith("item ")}
    for number, topic in enumerate(config.topics):
        for thing in topic.allowed:
            if _normal(thing) in restricted:
                yield f"{policy.at('topics', number)}: {thing} is restricted in another topic; remove one of them"
    for key, texts in (("requests", policy.requests), ("allowed_requests", policy.allowed_requests)):
        yield from _repeated(policy, key, texts)
    if both := {_normal(t) for t in policy.requests} & {_normal(t) for t in policy.allowed_requests}:
        yield f"{policy.at('allowed_requests')}: {min(both)!r} is restricted and allowed at once; remove one of them"
    yield from _placeholders(policy)
    if isinstance(config.wordings, dict) and (missing := [s for s in SPLITS if not config.wordings.get(s)]):
        yield f"{policy.at('wordings')}: no wordings for {_or([*missing]) if missing[1:] else missing[0]}"


def _repeated(policy: Policy, key: str, texts: Sequence[str]) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        if _normal(text) in seen:
            yield f"{policy.at(key)}: {key} has {text!r} twice; remove one of them"
        seen.add(_normal(text))


def _placeholders(policy: Policy) -> Iterator[str]:
    config = policy.config
    wordings = config.wordings.values() if isinstance(config.wordings, dict) else [config.wordings]
    places: list[tuple[tuple[str | int, ...], Sequence[str], bool]] = [
        (("wordings",), [text for texts in wordings for text in texts], True),
        (("refusals", "templates"), config.refusals.templates, False),
        (("starts",), config.starts, False),
        *((("topics", n, "requests"), topic.requests, False) for n, topic in enumerate(config.topics)),
    ]
    for key, texts, needed in places:
        for text in texts:
            names, where = _PLACEHOLDER.findall(text), f"{policy.at(*key)}: {text!r}"
            if unknown := [name for name in names if name not in KNOWN_PLACEHOLDERS]:
                yield f"{where}: unknown placeholder {{{unknown[0]}}}; there are {{item}} and {{name}}"
            if needed and not names:
                yield f"{where}: a wording needs {{item}} or {{name}}; whole requests go to `requests`"


def _normal(text: str) -> str:
    return " ".join(bare_name(text).casefold().split())
