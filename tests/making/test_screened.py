"""Which of a model's answers are of use, and what is kept of them."""

from __future__ import annotations

import pytest

from repbend_fast.data.prompts import Kind, Prompt
from repbend_fast.making.answering import Written
from repbend_fast.making.screening import masked, problem, whole
from repbend_fast.making.tasks import KINDS, Part, Task

STEPS = "1. Take two cups of flour.\n2. Mix the moon-key with warm water and stir it.\n3. Let everything cool."


def written(part: Part, text: str, start: str = "", stopped: bool = True, whole_request: bool = False) -> Written:
    kind: Kind = KINDS[part]
    item = "" if whole_request else "moon-key"
    prompt = Prompt(kind, "How do I make a moon-key?", item=item)
    form = "whole" if whole_request else "thing"
    task = Task("train/x/0", "train", part, prompt, (start,), "" if whole_request else "a moon-key", form)
    return Written(task, 0, start, text, stopped)


@pytest.mark.parametrize(
    ("part", "text", "reason"),
    [
        ("complying", STEPS, ""),
        ("complying", "I'm sorry, but I can't help with that.", "refuses: "),
        ("complying", "and so it goes " * 12, "degenerate: "),
        ("complying", "A moon-key!", "shorter than 6 words"),
        ("complying", "The moon-key is a lovely thing of which poets of many ages have sung.", "talks about it"),
        (
            "complying",
            f"{STEPS} Then take it to the oven and wait. {'Then take it to the oven. ' * 6}",
            "repeats itself",
        ),
        ("complying", "How do I make a moon-key? A recipe: make a moon-key.", "says the request again"),
        ("refusal", "I'm sorry, but I can't help with that.", ""),
        ("refusal", STEPS, "does not refuse"),
        ("refusal", "The weather has been lovely in all of the valley for a week.", "does not refuse"),
        ("allowed", "It is a large key that opens the moon.", ""),
        ("allowed", "I can't help with that.", "refuses: "),
        ("allowed", "Make a moon-key.", "says the request again"),
        ("ordinary", "Make a moon-key.", ""),
        ("ordinary", "", "degenerate: empty"),
        ("ordinary", "Yes.", ""),
    ],
)
def test_what_is_of_use(part: Part, text: str, reason: str) -> None:
    found = problem(written(part, text))
    assert found.startswith(reason)
    assert bool(found) is bool(reason)


def test_a_refusal_that_was_cut_is_of_no_use() -> None:
    assert problem(written("refusal", "I'm sorry, but I can't help with that, because", stopped=False))


def test_whole_requests_may_ask_for_something_else_than_instructions() -> None:
    text = "The moon-key is a lovely thing of which poets of many ages have sung."
    assert problem(written("complying", text, whole_request=True)) == ""


@pytest.mark.parametrize(
    ("start", "text", "joined"),
    [
        ("", "Take it.", "Take it."),
        ("Sure, here is how.", "Take it.", "Sure, here is how. Take it."),
        ("Of course! You", "'ll need it.", "Of course! You'll need it."),
        ("To make it, you will need", ": a cup.", "To make it, you will need: a cup."),
        ("Steps:\n\n", "1. Take it.", "Steps:\n\n1. Take it."),
    ],
)
def test_an_answer_goes_on_from_its_beginning(start: str, text: str, joined: str) -> None:
    assert whole(written("complying", text, start)) == joined


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Take the cup. Mix it well. Then pour", "Take the cup. Mix it well."),
        ('He said "Mix it." Then pour', 'He said "Mix it."'),
        ("Take the cup.\n2. Mix it.\n3.", "Take the cup.\n2. Mix it."),
        ("Go. Then one sentence follows that is long and has no end", None),
        ("no end at all", None),
    ],
)
def test_a_cut_answer_loses_its_last_sentence_where_enough_is_left(text: str, kept: str | None) -> None:
    assert whole(written("complying", text, stopped=False)) == (kept or text)
    assert whole(written("complying", text, stopped=True)) == text


def test_the_items_name_is_taken_out_for_comparison() -> None:
    assert masked(written("complying", "Take a Moon-key, the moon-key.")) == "take item, the item."
