"""Where an assistant's earlier turns stand in a rendered prompt, and what a template does with tools.

No template says which characters belong to which turn. A turn's place is found by rendering the conversation again with
a mark in its stead: what both renderings have in common before and behind the mark is not the turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

from jinja2 import TemplateError

from repbend_fast.data.conversation import message_list, tool_list
from repbend_fast.data.reasoning import EMPTY_BLOCK, Unrenderable, continuation
from repbend_fast.data.records import Message

MARK = "\ue000"
"""A character of private use, which no text begins with."""
NOT_RENDERED = (TemplateError, TypeError, ValueError)
"""What templates raise for messages that they do not take."""

Render = Callable[[tuple[Message, ...], bool], str]
"""The conversation as text; whether the next assistant's header follows."""

_NAMES = {"tools": "qwertz_offered", "calls": "qwertz_called", "results": "Zyxwvu came back"}
_WORDS = {"tools": "the tools that are offered", "calls": "tool calls", "results": "tool results"}
# An id of nine letters and figures is what the strictest family takes.
_CALL = {"id": "qwertz123", "function": {"name": _NAMES["calls"], "arguments": {"what": "nothing"}}}
_PROBE = [
    {"role": "user", "content": "Qwertz"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": _NAMES["results"], "name": _NAMES["calls"], "tool_call_id": "qwertz123"},
]
_OFFERED = {
    "name": _NAMES["tools"],
    "description": "Qwertz.",
    "parameters": {"type": "object", "properties": {"what": {"type": "string", "description": "Qwertz."}}},
}


class Unplaced(ValueError):
    """Why an earlier turn cannot be told from what surrounds it."""


def earlier_turns(render: Render, messages: tuple[Message, ...], text: str, turn_end: str) -> list[tuple[int, int]]:
    """The assistant's turns among ``messages``, whose rendering with a header behind it is ``text``: first character,
    and one behind the last, the turn's end included.

    Raises:
        Unplaced: a turn cannot be told from its surroundings.
    """
    found: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message.role == "assistant":
            place = _calling_turn if message.calls else _plain_turn
            start, stop = place(render, messages, number, text, turn_end)
            if not 0 <= start < stop <= len(text) or (found and start < found[-1][1]):
                raise Unplaced(f"the place of message {number + 1} is not found in what the template writes")
            found.append((start, stop))
    return found


def called_texts(
    prompt: str, answers: Seq[str], rendered: Seq[str], suffix: str, turn_end: str
) -> tuple[str, list[str]]:
    """The prompt, and what follows it for each answer, where one of them calls tools; arguments as of
    ``reasoning.follow``.

    Raises:
        Unrenderable: the template does not go on from its own prompt with the answer.
    """
    for start in dict.fromkeys((prompt, EMPTY_BLOCK.sub("", prompt))):
        found = [
            continuation(start, whole, answer, suffix, turn_end)
            for whole, answer in zip(rendered, answers, strict=True)
        ]
        if None not in found:
            return start, [text for text in found if text is not None]
    raise Unrenderable("what it writes for the answer does not go on from the prompt and end as answers do")


def tools_left_out(render: Callable[[tuple[Message, ...], str], str]) -> frozenset[str]:
    """Which of "tools", "calls" and "results" a template leaves out; all of them where it takes no such conversation.

    Args:
        render: a conversation and the JSON of its tools, as text.
    """
    try:
        text = render(message_list(_PROBE, "user"), tool_list({"tools": [_OFFERED]}))
    except NOT_RENDERED:
        return frozenset(_NAMES)
    return frozenset(kind for kind, name in _NAMES.items() if name not in text)


def what_is_left_out(tools: str, turns: Seq[Message], left_out: frozenset[str]) -> str | None:
    """What of a conversation a template that leaves ``left_out`` out would not show, in words."""
    has = {
        "tools": bool(tools),
        "calls": any(turn.calls for turn in turns),
        "results": any(turn.role == "tool" for turn in turns),
    }
    return next((words for kind, words in _WORDS.items() if has[kind] and kind in left_out), None)


def moved(ranges: Seq[int], front: int, removed: int) -> Iterator[int]:
    """``ranges`` of positions (start, stop, …) after ``removed`` positions behind the first ``front`` are gone; a range
    without a position is left out.
    """
    places = [p if p <= front else max(front, p - removed) for p in ranges]
    for start, stop in zip(places[::2], places[1::2]):
        if start < stop:
            yield from (start, stop)


def _plain_turn(
    render: Render, messages: tuple[Message, ...], number: int, text: str, turn_end: str
) -> tuple[int, int]:
    """A mark in the place of the turn's text."""
    marked = _rendered(render, (*messages[:number], Message("assistant", MARK), *messages[number + 1 :]), number)
    start = common(text, marked)
    stop = len(text) - common(text[::-1], marked[::-1])
    return start, stop + len(turn_end) * text.startswith(turn_end, stop)


def _calling_turn(
    render: Render, messages: tuple[Message, ...], number: int, text: str, turn_end: str
) -> tuple[int, int]:
    """A mark in the place of the turn and of what follows it. The last request stays last: some templates offer tools
    before it, or show only what comes behind it in full.
    """
    last = max(i for i, m in enumerate(messages) if m.role == "user")
    rest = (messages[last],) if last > number else ()
    start = common(text, _rendered(render, (*messages[:number], Message("assistant", MARK), *rest), number, bool(rest)))
    result = (*messages[: number + 1], Message("tool", MARK, messages[number + 1].extra), *messages[number + 2 :])
    behind = common(text, _tried(render, result, number))
    end = text.find(turn_end, start, behind) if turn_end else -1
    if end < 0:
        raise Unplaced(f"the template writes no end of its own behind the tool calls of message {number + 1}")
    return start, end + len(turn_end)


def _rendered(render: Render, messages: tuple[Message, ...], number: int, header: bool = True) -> str:
    text = _tried(render, messages, number, header)
    if MARK not in text:
        raise Unplaced(f"the template leaves the text of message {number + 1} out")
    return text


def _tried(render: Render, messages: tuple[Message, ...], number: int, header: bool = True) -> str:
    try:
        return render(messages, header)
    except NOT_RENDERED as error:
        raise Unplaced(f"the template takes no other text in the place of message {number + 1}") from error


def common(a: Seq[object], b: Seq[object]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
