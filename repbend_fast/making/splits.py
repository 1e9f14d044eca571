"""Who lies in which split: what is alike stays together, so that no split holds what another one nearly has."""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repbend_fast.data.duplicates import NearDuplicates
from repbend_fast.errors import UserError
from repbend_fast.making.bundled import bundled
from repbend_fast.making.policy import SPLITS, Form, Policy, Split, TopicConfig, bare_name, has_placeholder

LIKENESS = 0.6
"""Share of common words from which two requests or wordings count as one."""
LIKENESS_OF_ACTIVITIES = 0.75
"""The same for activities, of which many begin with the same words (`open a …`)."""
SPELLING = 0.84
"""Likeness of letters from which two names count as one."""


@dataclass(frozen=True)
class Divided:
    """Everything of a policy by split. ``topics`` hold their own requests; ``wordings`` and ``allowed`` are by form."""

    topics: Mapping[Split, list[TopicConfig]]
    requests: Mapping[Split, list[str]]
    allowed_requests: Mapping[Split, list[str]]
    wordings: Mapping[Form, Mapping[Split, list[str]]]
    allowed: Mapping[Form, Mapping[Split, list[str]]]


def divide(policy: Policy) -> Divided:
    """The splits of a policy, by its seed.

    Raises:
        UserError: too little to have something of each kind in every split without sharing.
    """
    config = policy.config
    topics, requests = _restricted(policy)
    forms: list[Form] = ["thing", "activity"]
    allowed: dict[Form, dict[Split, list[str]]] = {}
    for form in forms:
        own = {split: [x for t in topics[split] if t.form == form for x in t.allowed] for split in SPLITS}
        extra = _bundled_allowed(policy, form) if config.bundled_allowed else _empty()
        allowed[form] = {split: own[split] + extra[split] for split in SPLITS}
    near_requests = _spread(policy, "allowed_requests", list(policy.allowed_requests))
    things = _wordings_of_things(policy)
    # `If I wanted to {item} tonight` about an activity fits `If I wanted {item} tonight` about a thing.
    done = _spread(policy, "wordings", bundled()["wordings"]["activity"], needed=True, beside=things)
    return Divided(topics, requests, near_requests, {"thing": things, "activity": done}, allowed)


def groups(texts: Sequence[str], likeness: float = LIKENESS) -> list[list[int]]:
    """Numbers of texts that are alike, directly or by way of others, in the order of each group's first."""
    seen = NearDuplicates(likeness, 1)
    pairs: list[tuple[int, int]] = []
    for number, text in enumerate(texts):
        pairs += [(number, earlier) for earlier in seen.near(text)]
        seen.add(text)
    return _joined(len(texts), pairs)


def _joined(count: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """``count`` numbers in groups, so that both of every pair lie in one."""
    leader = list(range(count))

    def find(number: int) -> int:
        while leader[number] != number:
            number = leader[number]
        return number

    for a, b in pairs:
        first, second = sorted((find(a), find(b)))
        leader[second] = first
    found: dict[int, list[int]] = {}
    for number in range(count):
        found.setdefault(find(number), []).append(number)
    return list(found.values())


def same_name(a: str, b: str) -> bool:
    """Whether two names are one but for an ending, a spelling or a word more (``fog-bell``, ``old fog-bells``)."""
    words_a, words_b = (set(re.findall(r"\w+", bare_name(name).casefold())) for name in (a, b))
    if not words_a or not words_b:
        return False
    spelled = difflib.SequenceMatcher(None, bare_name(a).casefold(), bare_name(b).casefold())
    if spelled.real_quick_ratio() >= SPELLING and spelled.quick_ratio() >= SPELLING and spelled.ratio() >= SPELLING:
        return True
    return words_a <= words_b or words_b <= words_a


def _restricted(policy: Policy) -> tuple[dict[Split, list[TopicConfig]], dict[Split, list[str]]]:
    """Topics and whole requests, drawn together: each group of what is alike lies in one split."""
    config = policy.config
    topics = config.topics
    names = [[t.name, *(t.items or [])] if t.form == "thing" else [] for t in topics]
    pairs = [
        (a, b) for a in range(len(topics)) for b in range(a) if any(same_name(x, y) for x in names[a] for y in names[b])
    ]
    done = [(number, item) for number, topic in enumerate(topics) if topic.form == "activity" for item in topic.items]
    pairs += [
        (done[place][0], done[group[0]][0])
        for group in groups([text for _, text in done], LIKENESS_OF_ACTIVITIES)
        for place in group[1:]
    ]
    own = [(number, text) for number, topic in enumerate(topics) for text in topic.requests]
    own += [(len(topics) + number, text) for number, text in enumerate(policy.requests)]
    pairs += [(own[place][0], own[group[0]][0]) for group in groups([text for _, text in own]) for place in group[1:]]
    units = _joined(len(topics) + len(policy.requests), pairs)
    fixed: dict[int, Split] = {}
    for number, unit in enumerate(units):
        named = {split: topics[i].name for i in unit if i < len(topics) and (split := topics[i].split)}
        if len(named) > 1:
            (a, first), (b, second) = list(named.items())[:2]
            raise UserError(
                f"{policy.name}: topics {first} ({a}) and {second} ({b}) are alike and asked for in two splits; put "
                "them into one, or change their items or requests"
            )
        if named:
            fixed[number] = next(iter(named))
    kinds = [topics[unit[0]].form if unit[0] < len(topics) else "request" for unit in units]
    placed = _draw(policy, "topics and requests", kinds, fixed)
    where = {i: split for unit, split in zip(units, placed, strict=True) for i in unit}
    return (
        {s: [t for i, t in enumerate(topics) if where[i] == s] for s in SPLITS},
        {s: [t for i, t in enumerate(policy.requests) if where[len(topics) + i] == s] for s in SPLITS},
    )


def _draw(policy: Policy, what: str, kinds: Sequence[str], fixed: Mapping[int, Split]) -> list[Split]:
    """A split for each group, stratified by the groups' ``kinds``; those that are fixed count towards the shares.

    Raises:
        UserError: a split would be empty.
    """
    shares, count = policy.config.splits, len(kinds)
    missing = [split for split in SPLITS if split not in fixed.values()]
    free = [number for number in range(count) if number not in fixed]
    if len(free) < len(missing):
        key = what.partition(" ")[0]
        raise UserError(
            f"{policy.at(key)}: {what}: {count} that differ {'is' if count == 1 else 'are'} too few, as training, "
            f"validation and test share none; give at least {count + len(missing) - len(free)}; what is alike counts "
            "as one"
        )
    wanted = {"validation": max(1, round(shares.validation * count)), "test": max(1, round(shares.test * count))}
    random.Random(f"{policy.config.seed}:{what}").shuffle(free)
    placed = dict(fixed)
    for split in SPLITS[1:]:
        left = len(free) - ("train" not in placed.values()) - (split == "validation" and "test" in missing)
        already = sum(found == split for found in fixed.values())
        take = max(min(wanted[split] - already, left), int(split in missing))
        for _ in range(take):
            number = _lagging(kinds, placed, split, free)
            free.remove(number)
            placed[number] = split
    placed |= dict.fromkeys(free, "train")
    return [placed[number] for number in range(count)]


def _lagging(kinds: Sequence[str], placed: Mapping[int, Split], split: Split, free: Sequence[int]) -> int:
    """The last free group of the kind of which ``split`` has least by that kind's share of all groups, where training
    keeps one of the kind if it can: a form that training never had is no test of what it learned.
    """
    everywhere, unplaced = Counter(kinds), Counter(kinds[number] for number in free)
    inside = Counter(kinds[number] for number, found in placed.items() if found == split)
    trained = Counter(kinds[number] for number, found in placed.items() if found == "train")
    kept = [kind for kind in sorted(unplaced) if unplaced[kind] + trained[kind] > 1] or sorted(unplaced)
    size, total = inside.total() + 1, len(kinds)
    behind = max(kept, key=lambda kind: (everywhere[kind] * size - inside[kind] * total, everywhere[kind]))
    return next(number for number in reversed(free) if kinds[number] == behind)


def spread_ordinary(policy: Policy) -> dict[Split, list[str]]:
    """The policy's own ordinary requests by split.

    Raises:
        UserError: too few.
    """
    return _spread(policy, "ordinary", list(policy.ordinary or ()), needed=True)


def _spread(
    policy: Policy,
    what: str,
    texts: list[str],
    needed: bool = False,
    beside: Mapping[Split, Sequence[str]] | None = None,
) -> dict[Split, list[str]]:
    """Texts by split, those that are alike in one; in training alone where they are too few and need not be split.

    ``beside``: texts that have their splits: what is alike follows them, and is left out where they lie in two.
    """
    if not texts:
        return _empty()
    settled = [(split, text) for split in SPLITS for text in (beside or _empty())[split]]
    found = groups([*(text for _, text in settled), *texts])
    drawn = [
        ({settled[i][0] for i in group if i < len(settled)}, [i - len(settled) for i in group if i >= len(settled)])
        for group in found
    ]
    alike = [(splits, group) for splits, group in drawn if group and len(splits) < 2]
    if len(alike) < len(SPLITS) and not needed:
        return {**_empty(), "train": texts}
    fixed = {number: next(iter(splits)) for number, (splits, _) in enumerate(alike) if splits}
    placed = _draw(policy, what, [what] * len(alike), fixed)
    where = {i: split for (_, group), split in zip(alike, placed, strict=True) for i in group}
    return {split: [text for i, text in enumerate(texts) if where.get(i) == split] for split in SPLITS}


def _empty() -> dict[Split, list[str]]:
    return {split: [] for split in SPLITS}


def _bundled_allowed(policy: Policy, form: Form) -> dict[Split, list[str]]:
    """The bundled harmless things, without any that the policy names itself."""
    topics = policy.config.topics
    named = [name for t in topics for name in (t.name, *t.items, *t.allowed)]
    return _spread(
        policy,
        f"bundled {form}",
        [x for x in bundled()["allowed"][form] if not any(same_name(x, name) for name in named)],
    )


def _wordings_of_things(policy: Policy) -> dict[Split, list[str]]:
    """Wordings with a place for an item; a policy's own are for things.

    Raises:
        UserError: too few, or one in a split that another split nearly has.
    """
    given = policy.config.wordings
    if not isinstance(given, dict):
        return _spread(policy, "wordings", list(given or bundled()["wordings"]["thing"]), needed=True)
    texts = [(split, text) for split in SPLITS for text in given[split]]
    for group in groups([text for _, text in texts], likeness=0.999):
        splits = [texts[i] for i in group]
        if len({split for split, _ in splits}) > 1:
            raise UserError(
                f"{policy.at('wordings')}: {splits[0][1]!r} ({splits[0][0]}) stands in another split too; keep one"
            )
    return {split: list(given[split]) for split in SPLITS}


def own_wordings(topic: TopicConfig) -> tuple[list[str], list[str]]:
    """A topic's own requests: those with a place for an item, and whole ones."""
    return (
        [text for text in topic.requests if has_placeholder(text)],
        [text for text in topic.requests if not has_placeholder(text)],
    )
