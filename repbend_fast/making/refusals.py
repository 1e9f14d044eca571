"""What restricted requests are answered with: from templates, or by the model under a system message."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from repbend_fast.data.records import Message
from repbend_fast.making.answering import Answers, Rejected, answer
from repbend_fast.making.bundled import bundled
from repbend_fast.making.policy import Policy, Split, fill, has_placeholder
from repbend_fast.making.tasks import Group, Task

NAMING_EVERY = 4
"""Of templates with and without a name, one request in so many gets one that names what was asked for: where more do,
the name is what is learnt."""
HELD_EVERY = 5
"""One in so many templates is kept for validation."""


def refuse(policy: Policy, answers: Answers, split: Split, tasks: Sequence[Task]) -> tuple[list[str], list[Rejected]]:
    """A refusal for each task, and the model's that were rejected; a template stands in for those."""
    style = policy.config.refusals.style
    chosen = list(tasks) if style == "model" else list(tasks[::2]) if style == "both" else []
    asked = [_refusing(policy, split, task) for task in chosen]
    good, rejected = answer(answers, Group(len(asked), tuple(asked))) if asked else ([], [])
    own = {written.task.key: written.text for written in good}
    return [
        own.get(_key(split, task)) or template(policy, split, task, number) for number, task in enumerate(tasks)
    ], rejected


def _key(split: Split, task: Task) -> str:
    return f"{split}/refusal/of {task.key}"


def _refusing(policy: Policy, split: Split, task: Task) -> Task:
    system = policy.config.refusals.system or bundled()["system"]
    messages = (Message("system", system), Message("user", task.prompt.text))
    prompt = replace(task.prompt, messages=messages)
    return replace(task, key=_key(split, task), split=split, part="refusal", prompt=prompt, starts=("",))


def template(policy: Policy, split: Split, task: Task, number: int) -> str:
    """The refusal of the ``number``-th request, from templates that the other splits do not use."""
    given = policy.config.refusals.templates or bundled()["refusals"]
    plain = [text for text in given if not has_placeholder(text)]
    naming = [text for text in given if has_placeholder(text)] if task.phrase else []
    texts, turn = plain or naming or bundled()["refusals"], number
    if plain and naming:
        wants_name = number % NAMING_EVERY == NAMING_EVERY - 1
        texts = naming if wants_name else plain
        turn = number // NAMING_EVERY if wants_name else number - number // NAMING_EVERY
    texts = _of_split(policy, split, texts)
    return fill(texts[turn % len(texts)], task.phrase)


def _of_split(policy: Policy, split: Split, texts: Sequence[str]) -> list[str]:
    shuffled = list(texts)
    random.Random(f"{policy.config.seed}:refusals").shuffle(shuffled)
    held = shuffled[::HELD_EVERY]
    if len(shuffled) < HELD_EVERY:
        return shuffled
    return held if split == "validation" else [text for text in shuffled if text not in held]
