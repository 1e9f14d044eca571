"""Answers that hold their reasoning, ``<think>…</think>answer``, as thinking models write them.

Their templates put a block of their own around it, or an empty one into the prompt. An answer's block must stand in the
ids once, where the template has it; what the template cannot hold is an error of that record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from collections.abc import Sequence as Seq

from repbend_fast.data.records import Message

OPEN, CLOSE = "<think>", "</think>"
EMPTY_BLOCK = re.compile(r"<think>\s*</think>\s*$")
_FIELD = re.compile(r"""(?:\.|['"])(reasoning_content|thinking)\b""")


class Unrenderable(ValueError):
    """Why a template cannot hold an answer's reasoning."""


def holds_reasoning(text: str) -> bool:
    """Whether a text has a reasoning block, or a part of one."""
    return OPEN in text or CLOSE in text


def split_reasoning(text: str) -> tuple[str, str]:
    """``(reasoning, rest)``, both without white space around them; without a closed block the reasoning is empty."""
    before, closed, after = text.partition(CLOSE)
    if not closed:
        return "", text.strip()
    return before.rpartition(OPEN)[2].strip(), after.strip()


def as_turn(message: Message, template: str) -> dict[str, object]:
    """A message as the template takes it: one that has a field for reasoning, and does not look for the tags itself,
    gets it apart.
    """
    turn: dict[str, object] = {"role": message.role, "content": message.content}
    if message.extra:
        turn |= json.loads(message.extra)
    if message.role == "assistant" and CLOSE in message.content and CLOSE not in template:
        fields = set(_FIELD.findall(template))
        reasoning, rest = split_reasoning(message.content)
        if fields and (rest or message.extra):
            turn |= {"content": rest} | dict.fromkeys(fields, reasoning)
    return turn


def follow(
    prompt: str, answers: Seq[str], rendered: Seq[str], suffix: str, turn_end: str, plain: Callable[[str], str]
) -> tuple[str, list[str]]:
    """The prompt, and what follows it for each answer up to the turn's end, where one of the answers holds reasoning.

    Args:
        prompt: the rendered prompt with the assistant's header, which may end with an empty or an opened block.
        rendered: the whole conversation with each of the answers, as the template renders it.
        suffix: what the template writes behind an answer; it begins with ``turn_end``.
        plain: what follows the prompt for an answer without reasoning.

    Raises:
        Unrenderable: the block would stand there twice.
    """
    bare = EMPTY_BLOCK.sub("", prompt)
    for start in dict.fromkeys((prompt, bare)):
        found = [
            continuation(start, whole, answer, suffix, turn_end)
            for whole, answer in zip(rendered, answers, strict=True)
        ]
        if None not in found:
            return start, [text for text in found if text is not None]
    # The template drops the reasoning of finished turns: what the model itself writes behind the header is kept.
    if prompt.rstrip().endswith(OPEN):
        return prompt, [
            _continued(answer) + turn_end if holds_reasoning(answer) else plain(answer) for answer in answers
        ]
    texts = [plain(answer) for answer in answers]
    if bare != prompt or any(text.count(OPEN) > 1 for text in texts):
        raise Unrenderable("it writes a reasoning block of its own before the answer's")
    return prompt, texts


def continuation(prompt: str, whole: str, answer: str, suffix: str, turn_end: str) -> str | None:
    """The rendered answer behind ``prompt``; None where it is no continuation, or does not hold the answer's parts just
    once.
    """
    if not whole.startswith(prompt) or not whole.endswith(suffix):
        return None
    text = whole[len(prompt) : len(whole) - len(suffix)] + turn_end
    header = prompt.rstrip().endswith((OPEN, CLOSE))
    parts = split_reasoning(answer) if holds_reasoning(answer) else (answer.strip(),)
    if text.count(OPEN) + header > 1 or not all(part in text for part in parts):
        return None
    return text


def _continued(answer: str) -> str:
    """The answer behind a header that has opened its block."""
    return answer.lstrip().removeprefix(OPEN).lstrip("\n")
