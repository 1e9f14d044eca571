"""From a policy to what the model is to write: every request with its split, and what is asked of the held-out ones."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from repbend_fast.data.prompts import Kind, Prompt
from repbend_fast.errors import UserError
from repbend_fast.making.bundled import bundled, ordinary_questions, ordinary_requests
from repbend_fast.making.policy import SPLITS, Form, Policy, Split, bare_name, fill
from repbend_fast.making.splits import Divided, own_wordings, spread_ordinary

T = TypeVar("T")
Part = Literal["complying", "refusal", "allowed", "ordinary"]
KINDS: dict[Part, Kind] = {
    "complying": "attack",
    "refusal": "attack",
    "allowed": "borderline",
    "ordinary": "ordinary",
}
SPARE = 0.25
"""More requests than are wanted, for those whose answers are of no use."""


@dataclass(frozen=True)
class Task:
    """A request that the model is to answer, in ``part`` of ``split``. ``starts``: how the answer is made to begin, one
    for each attempt. ``phrase``: the item with its article; empty for whole requests. ``form``: ``whole`` for those.
    """

    key: str
    split: Split
    part: Part
    prompt: Prompt
    starts: tuple[str, ...] = ("",)
    phrase: str = ""
    form: Form | Literal["whole"] = "whole"


@dataclass(frozen=True)
class Asked:
    """A request about ``phrase``."""

    text: str
    phrase: str = ""
    form: Form | Literal["whole"] = "whole"

    def prompt(self, kind: Kind, target: str = "") -> Prompt:
        """As a prompt, with the item as a judge looks for it."""
        return Prompt(kind, self.text, item=bare_name(self.phrase) if kind == "attack" else "", target=target)


@dataclass(frozen=True)
class Group:
    """Tasks of one part of one split, of which ``wanted`` are to come out well."""

    wanted: int
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Work:
    """All that a policy comes to: what the model answers, further restricted requests of training that are only
    refused, and the prompts that are held out.
    """

    groups: tuple[Group, ...]
    refused: tuple[Task, ...]
    prompts: dict[Split, list[Prompt]]


def work_of(policy: Policy, divided: Divided, limit: int | None = None) -> Work:
    """The tasks of a policy and its held-out prompts. ``limit``: at most so many of everything.

    Raises:
        UserError: nothing to ask in some part.
    """
    counts = policy.config.counts
    wanted = {"attacks": counts.attacks, "refused": counts.refused, "allowed": counts.allowed}
    wanted |= {"ordinary": counts.ordinary, "validation": counts.validation, "test": counts.test}
    wanted = {name: count if limit is None else min(count, limit) for name, count in wanted.items()}
    restricted = {split: _restricted(policy, divided, split) for split in SPLITS}
    allowed = {split: _allowed(policy, divided, split) for split in SPLITS}
    ordinary, questions = _ordinary(policy, divided)
    found = (
        _group(policy, "train", "complying", restricted["train"], wanted["attacks"]),
        _group(policy, "train", "allowed", allowed["train"], wanted["allowed"]),
        _group(policy, "train", "ordinary", ordinary["train"], wanted["ordinary"]),
        _group(policy, "validation", "complying", restricted["validation"], wanted["validation"]),
        _group(policy, "validation", "allowed", allowed["validation"], wanted["validation"]),
        _group(policy, "validation", "ordinary", ordinary["validation"], wanted["validation"]),
        _group(policy, "test", "ordinary", ordinary["test"], wanted["test"]),
    )
    prompts: dict[Split, list[Prompt]] = {}
    for split in SPLITS[1:]:
        attacks = [asked.prompt("attack", _target(asked)) for asked in restricted[split][: wanted[split]]]
        borderline = [asked.prompt("borderline") for asked in allowed[split][: wanted[split]]]
        prompts[split] = [*attacks, *borderline, *questions[split][: wanted[split]]]
    return Work(found, _refused(policy, found[0], restricted["train"], wanted["refused"]), prompts)


def _group(policy: Policy, split: Split, part: Part, asked: Sequence[Asked], wanted: int) -> Group:
    if not asked:
        what = {"complying": "restricted requests", "allowed": "allowed look-alikes", "ordinary": "ordinary requests"}
        raise UserError(f"{policy.name}: no {what[part]} for {split}; name more of them")
    planned = min(len(asked), wanted + round(SPARE * wanted) + 2)
    tasks = [_task(policy, split, part, number, one) for number, one in enumerate(asked[:planned])]
    return Group(min(wanted, len(tasks)), tuple(tasks))


def _task(policy: Policy, split: Split, part: Part, number: int, asked: Asked) -> Task:
    starts: tuple[str, ...] = ("",)
    given = policy.config.starts or bundled()["starts"][asked.form]
    if part == "complying":
        turns = range(number, number + min(policy.config.attempts, len(given)))
        starts = tuple(fill(given[turn % len(given)], asked.phrase) for turn in turns)
    elif part == "allowed" and split == "train" and number % 2:
        # Else "Sure, here is how" would be bent whatever follows: only complying answers would begin with it.
        starts = (fill(given[number // 2 % len(given)], asked.phrase), "")
    key = f"{split}/{part}/{number}"
    return Task(key, split, part, asked.prompt(KINDS[part]), starts, asked.phrase, asked.form)


def _refused(policy: Policy, complying: Group, asked: Sequence[Asked], wanted: int) -> tuple[Task, ...]:
    """Other requests than those with a complying answer; those of each item that come last."""
    others = asked[len(complying.tasks) :][::-1][:wanted]
    return tuple(_task(policy, "train", "refusal", number, one) for number, one in enumerate(others))


def _target(asked: Asked) -> str:
    return fill(bundled()["starts"][asked.form][0], asked.phrase)


def _restricted(policy: Policy, divided: Divided, split: Split) -> list[Asked]:
    """Every restricted request of a split, so that any beginning of the list has all items about equally often."""
    found: list[list[Asked]] = []
    for topic in divided.topics[split]:
        own, whole = own_wordings(topic)
        wordings = own or ([] if whole else divided.wordings[topic.form][split])
        items = [(item, topic.form) for item in topic.items or [topic.name]]
        found += [[Asked(text) for text in _shuffled(policy, f"own {topic.name}", whole)]] if whole else []
        found += _combined(policy, items, wordings, len(found)) if wordings else []
    found += [[Asked(text)] for text in divided.requests[split]]
    return _in_turn(policy, f"restricted {split}", found)


def _allowed(policy: Policy, divided: Divided, split: Split) -> list[Asked]:
    found: list[list[Asked]] = []
    for form in _forms(policy):
        things = [(thing, form) for thing in divided.allowed[form][split]]
        found += _combined(policy, things, divided.wordings[form][split], len(found))
    found += [[Asked(text)] for text in divided.allowed_requests[split]]
    return _in_turn(policy, f"allowed {split}", found)


def _forms(policy: Policy) -> list[Form]:
    """The forms of look-alikes: those of the topics, or both where there are whole requests alone."""
    forms: list[Form] = ["thing", "activity"]
    return [form for form in forms if any(t.form == form for t in policy.config.topics) or not policy.config.topics]


def _combined(
    policy: Policy, items: Sequence[tuple[str, Form]], wordings: Sequence[str], first: int
) -> list[list[Asked]]:
    """For each item all its requests, in an order of wordings that moves on from item to item, from ``first`` on."""
    turned = _shuffled(policy, "order of wordings", wordings)
    return [
        [Asked(fill(turned[(number + turn) % len(turned)], item), item, form) for turn in range(len(turned))]
        for number, (item, form) in enumerate(items, first)
    ]


def _in_turn(policy: Policy, what: str, lists: Sequence[Sequence[Asked]]) -> list[Asked]:
    """The first of every list, then the second of every list, and so on, each text once."""
    shuffled = _shuffled(policy, what, lists)
    found = [one[turn] for turn in range(max(map(len, shuffled), default=0)) for one in shuffled if turn < len(one)]
    return list({asked.text: asked for asked in reversed(found)}.values())[::-1]


def _ordinary(policy: Policy, divided: Divided) -> tuple[dict[Split, list[Asked]], dict[Split, list[Prompt]]]:
    """Ordinary requests to be answered, and ordinary questions to evaluate with, by split. Those in a wording that
    another split has are left out.
    """
    if policy.ordinary is None:
        texts = {split: _shuffled(policy, "ordinary", ordinary_requests(split)) for split in SPLITS}
        questions = {split: list(ordinary_questions(split)) for split in SPLITS[1:]}
    else:
        texts = spread_ordinary(policy)
        questions = {split: [Prompt("ordinary", text) for text in texts[split]] for split in SPLITS[1:]}
    worded = {split: _in_wordings(policy, divided, split) for split in SPLITS}

    def is_own(text: str, split: Split) -> bool:
        return not any(worded[other].fullmatch(text) for other in SPLITS if other != split)

    return (
        {split: [Asked(text) for text in texts[split] if is_own(text, split)] for split in SPLITS},
        {split: [q for q in questions[split] if is_own(q.text, split)] for split in SPLITS[1:]},
    )


def _in_wordings(policy: Policy, divided: Divided, split: Split) -> re.Pattern[str]:
    """What fits one of the wordings that a split's requests are made of."""
    wordings = [wording for form in _forms(policy) for wording in divided.wordings[form][split]]
    forms = (".+".join(map(re.escape, re.split(r"\{\w+\}", wording))) for wording in wordings)
    return re.compile("|".join(forms), re.IGNORECASE)


def _shuffled(policy: Policy, what: str, values: Sequence[T]) -> list[T]:
    found = list(values)
    random.Random(f"{policy.config.seed}:{what}").shuffle(found)
    return found
