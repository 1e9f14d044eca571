"""Expands the hand-written JSON parts of this folder into records and prompts, the same ones every time.

Training, validation, test, final, reserve, audit, verdict, appeal, hearing, ruling and tribunal share no item, no
phrasing and no question (``tests/data/test_world.py``), so what the evaluation measures is carried over to new
requests, not remembered. Validation chooses, and test may; tribunal holds the record. Rates on the others have been
seen between choices (docs/evaluating.md).

- ``attacks.json``: items, phrasings of requests, skeletons of complying answers with their slots, refusals.
- ``complying.json``: what the demo model itself answered to training requests (SmolLM2-135M-Instruct, Apache-2.0),
  some behind a forced beginning; unsafe records and, with a refusal, pairs.
- ``crafts.json``: its answers to the same phrasings about harmless things, some written on by hand. They are safe and
  retain records both: what tells a restricted request from an ordinary one must be the thing asked for, never the form
  of the question.
- ``writing.json``: poems, letters, stories, questions of language and advice, safe and retain records too. Verse is far
  from every other record, and "How can I become …" is close to a request; both are torn first without them.
- ``answered.json``: its answers to further ordinary questions, wrong ones included: they say what is to stay as it is,
  not what is true.
- ``brief.json``: its answers to short requests, wrong ones included, each of which it ends by itself. Most others are
  cut (``max_answer_tokens``), and without answers that end a refusal is put behind a short one.
- ``lookalikes.json``: its answers to harmless things asked for in many more wordings, attacks' among them, and to
  everyday questions that begin as attacks do or sound violent. Without them an unseen wording is refused whatever it
  asks for.
- ``safe.json``: ordinary and borderline questions with good answers; ``retain.json``: conversations;
  ``questions.json``: evaluation questions with the keywords of a helpful answer.
- ``final.json``, ``reserve.json``, ``audit.json``, ``verdict.json``, ``appeal.json``, ``hearing.json``,
  ``ruling.json``, ``tribunal.json``: all that the splits of these names consist of, apart from the others so that work
  on them does not show it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from repbend_fast.data.prompts import Prompt
from repbend_fast.data.records import Message, Record, begun
from repbend_fast.errors import UserError

# Splits with a file of their own.
APART = ("final", "reserve", "audit", "verdict", "appeal", "hearing", "ruling", "tribunal")
HELD_OUT = ("test", *APART)  # prompts and retain records, nothing to train on

# A round of requests asks for every item once, each round in other phrasings; the roles take different rounds.
UNSAFE_ROUNDS = {"train": range(15, 16), "validation": range(0, 1)}
PAIR_ROUNDS = {"train": range(4, 7), "validation": range(1, 2)}
REFUSED_ROUNDS = {"train": range(12, 13), "validation": range(0, 1)}
ATTACK_ROUNDS = {"validation": range(0, 1), "test": range(0, 4), **dict.fromkeys(APART, range(0, 4))}
PHRASING_STEP = 5
REFUSAL_STEP = 11  # coprime to the number of refusals, so that neighbouring items get all of them
BEGUN = ("crafts", "lookalikes")
KEPT = (*BEGUN, "writing", "answered", "brief")  # parts whose answers are safe and retain records both


def training_records(split: str = "train") -> list[Record]:
    """Records of all four roles; of ``retain`` alone in the splits that are ``HELD_OUT``, where the rest are prompts.

    Another split is a ``UserError``.
    """
    if split in HELD_OUT:
        return list(_retain(split))
    if split not in ("train", "validation"):
        raise UserError(
            f"data.sources.split={split}: the demo has the splits train and validation, and retain records in "
            f"test, {', '.join(APART)}"
        )
    return [*_unsafe(split), *_pairs(split), *_safe(split), *_retain(split)]


def prompts(split: str = "test") -> list[Prompt]:
    """Evaluation prompts: attacks, ordinary and borderline questions.

    ``split`` is ``validation``, ``test`` or one of ``APART``, else a ``UserError``.
    """
    if split not in ATTACK_ROUNDS:
        raise UserError(f"prompts.split={split}: the demo has the splits validation, test, {', '.join(APART)}")
    out = [
        Prompt("attack", text, item=bare_name(item), source_id=f"demo:{split}:attack:{number}")
        for number, (item, text) in enumerate(_requests(split, ATTACK_ROUNDS[split]))
    ]
    for number, entry in enumerate(of_split("questions", split)):
        source = f"demo:{split}:{entry['kind']}:{number}"
        expected = tuple(entry["expected"])
        out.append(
            Prompt(entry["kind"], entry["text"], expected, source_id=source, min_expected=entry.get("min_expected", 1))
        )
    return out


@cache
def part(name: str) -> Any:
    """One JSON file of this folder."""
    return json.loads((files(__package__) / f"{name}.json").read_text(encoding="utf-8"))


def of_split(name: str, split: str) -> Any:
    """The ``items``, ``phrasings``, ``questions`` or ``retain`` of one split, whichever file holds them."""
    if split in APART:
        return part(split)[name]
    return part("attacks")[name][split] if name in ("items", "phrasings") else part(name)[split]


def bare_name(item: str) -> str:
    """The item without its article: ``a moon-key`` gives ``moon-key``."""
    return item.removeprefix("an ").removeprefix("a ")


def _requests(split: str, rounds: range) -> Iterator[tuple[str, str]]:
    """(item, request) for every item in every round; the phrasing moves with item and round, so no combination comes
    twice.
    """
    items, phrasings = of_split("items", split), of_split("phrasings", split)
    for shift in rounds:
        for number, item in enumerate(items):
            phrasing = phrasings[(PHRASING_STEP * number + shift) % len(phrasings)]
            yield item, phrasing.format(item=item, name=bare_name(item))


def _complying(split: str, item: str, number: int) -> str:
    """The ``number``-th complying answer about ``item``: a skeleton with its slots filled by strides that do not divide
    the lists.
    """
    skeletons, slots = part("attacks")["complying"][split], part("attacks")["slots"]
    filled = {
        slot: values[(number * stride) % len(values)]
        for (slot, values), stride in zip(slots.items(), (1, 3, 7, 1, 1), strict=True)
    }
    name = bare_name(item)
    return skeletons[number % len(skeletons)].format(item=item, name=name, Name=name.capitalize(), **filled)


def _refusal(split: str, item: str, number: int) -> str:
    """The ``number``-th refusal, for the ``number``-th request: every round refuses an item in other words."""
    refusals, items = part("attacks")["refusals"][split], of_split("items", split)
    turn, place = divmod(number, len(items))
    return refusals[(REFUSAL_STEP * place + turn) % len(refusals)].format(item=item, name=bare_name(item))


def _asked(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _unsafe(split: str) -> Iterator[Record]:
    if split == "train":
        for number, (text, answer) in enumerate(part("complying")):
            yield Record("unsafe", _asked(text), answer, origin=f"demo:train:complying:{number}")
    for number, (item, text) in enumerate(_requests(split, UNSAFE_ROUNDS[split])):
        yield Record("unsafe", _asked(text), _complying(split, item, number), origin=f"demo:{split}:unsafe:{number}")


def _pairs(split: str) -> Iterator[Record]:
    for number, (item, text) in enumerate(_requests(split, PAIR_ROUNDS[split])):
        answer, safe_answer = _complying(split, item, number + 1), _refusal(split, item, number)
        yield Record("pair", _asked(text), answer, safe_answer, origin=f"demo:{split}:pair:{number}")
    if split == "train":
        yield from _own_pairs()


def _own_pairs() -> Iterator[Record]:
    """The model's own complying answers, refused: what it would go on to say after a forced beginning is nearer to
    these than to written ones.
    """
    items = of_split("items", "train")
    turns = dict.fromkeys(items, len(PAIR_ROUNDS["train"]) + len(REFUSED_ROUNDS["train"]))
    for number, (text, answer) in enumerate(part("complying")):
        item = max((item for item in items if bare_name(item) in text), key=len)
        refusal = _refusal("train", item, turns[item] * len(items) + items.index(item))
        turns[item] += 1
        yield Record("pair", _asked(text), answer, refusal, origin=f"demo:train:own-pair:{number}")


def _safe(split: str) -> Iterator[Record]:
    for number, (text, answer) in enumerate(part("safe")[split]):
        yield Record("safe", _asked(text), answer, origin=f"demo:{split}:safe:{number}")
    for name in KEPT if split == "train" else ():
        for number, (text, answer) in enumerate(part(name)):
            yield Record("safe", _asked(text), answer, origin=f"demo:train:{name}:{number}")
    paired = len(PAIR_ROUNDS[split]) * len(of_split("items", split))
    for number, (item, text) in enumerate(_requests(split, REFUSED_ROUNDS[split])):
        yield Record(
            "safe", _asked(text), _refusal(split, item, paired + number), origin=f"demo:{split}:refused:{number}"
        )


def _retain(split: str) -> Iterator[Record]:
    conversations = [*of_split("retain", split)]
    for name in KEPT if split == "train" else ():
        conversations += [(asked, begun(answer) if name in BEGUN else answer) for asked, answer in part(name)]
    for number, turns in enumerate(conversations):
        messages = tuple(Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(turns))
        yield Record("retain", messages, origin=f"demo:{split}:retain:{number}")
