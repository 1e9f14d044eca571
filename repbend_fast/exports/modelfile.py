"""Ollama's Modelfile for a GGUF file: the chat template in Ollama's own language, read off what the model's template
renders, and the tokens that end an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from repbend_fast.data.tokenizer import Tokenizer

_SYSTEM, _FIRST, _ANSWER, _SECOND = "Qsystemq", "Qfirstq", "Qanswerq", "Qsecondq"
Turn = Mapping[str, str]


@dataclass(frozen=True)
class Turns:
    """What stands before and after the text of each role, and before an answer that is to be generated.

    ``default``: the system text where none is given; ``system`` is None where the template takes none.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    header: str
    default: str = ""

    def rendered(self, talk: Sequence[Turn]) -> str:
        """A conversation in these turns, ready for the next answer."""
        found = ""
        if self.default and self.system and talk[0]["role"] != "system":
            found = self.system[0] + self.default + self.system[1]
        for turn in talk:
            before, after = {"user": self.user, "assistant": self.assistant, "system": self.system or ("", "")}[
                turn["role"]
            ]
            found += before + turn["content"] + after
        return found + self.header

    def template(self) -> str:
        """The same as a Go template over Ollama's ``.Messages``; nothing in it trims blanks."""
        roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        branches = [
            f'if eq .Role "{role}" }}}}{ends[0]}{{{{ .Content }}}}{ends[1]}' for role, ends in roles.items() if ends
        ]
        return "{{ range .Messages }}{{ " + "{{ else ".join(branches) + "{{ end }}{{ end }}" + self.header


def modelfile(file: str, tokenizer: Tokenizer, stops: Iterable[int]) -> tuple[str, bool]:
    """The text, and whether it has a template: one that is no plain sequence of turns is left to Ollama, which knows
    some by their text in the GGUF file.
    """
    lines = [f"FROM ./{file}"]
    turns = turns_of(tokenizer)
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.template()}"""')
        if turns.default:
            lines.append(f'SYSTEM """{turns.default}"""')
    texts = dict.fromkeys(tokenizer.convert_ids_to_tokens(stop) for stop in stops)
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in texts]
    return "\n".join(lines) + "\n", turns is not None


def turns_of(tokenizer: Tokenizer) -> Turns | None:
    """The turns that the tokenizer's template is made of; None where it does not come apart into them.

    They are read off three conversations and held to be right only if they render a fourth one as the template does.
    BOS is left out: llama.cpp puts it first by itself.
    """
    try:
        found = _read_off(tokenizer)
    except Exception:  # whatever a template raises, it is not one of turns
        return None
    unsafe = found is not None and any(
        mark in part for part in (found.template(), found.default) for mark in ('"""', "\\")
    )
    return None if unsafe else found


def _read_off(tokenizer: Tokenizer) -> Turns | None:
    talk = [_turn("user", _FIRST), _turn("assistant", _ANSWER), _turn("user", _SECOND)]
    plain = _render(tokenizer, talk, False)
    start, between, back, end = _cut(plain, _FIRST, _ANSWER, _SECOND)
    header = _render(tokenizer, talk, True).removeprefix(plain)
    if not between.startswith(end):
        return None
    answer_start = between.removeprefix(end)
    # A template with a system text of its own begins with more than the first turn.
    starts = (part for part in (start, back.removeprefix(end)) if part and back.endswith(part) and start.endswith(part))
    user_start = next(starts, None)
    if user_start is None:
        return None
    system = None
    try:
        talk_of_system = [_turn("system", _SYSTEM), talk[0]]
        system_start, system_end, rest = _cut(_render(tokenizer, talk_of_system, False), _SYSTEM, _FIRST)
    except Exception:  # some templates refuse a system turn
        pass
    else:
        if rest == end and system_end.endswith(user_start):
            system = (system_start, system_end.removesuffix(user_start))
    turns = Turns((user_start, end), (answer_start, back.removesuffix(user_start)), system, header)
    if (default := start.removesuffix(user_start)) and system:
        text = default.removeprefix(system[0]).removesuffix(system[1])
        turns = Turns(turns.user, turns.assistant, system, header, text)
    return turns if _holds(turns, tokenizer, talk) else None


def _holds(turns: Turns, tokenizer: Tokenizer, talk: list[Turn]) -> bool:
    talks = [talk, [*talk, _turn("assistant", "Another one."), _turn("user", "And more?")]]
    talks += [[_turn("system", "Be brief."), *talk] for _ in range(turns.system is not None)]
    return all(turns.rendered(each) == _render(tokenizer, each, True) for each in talks)


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _render(tokenizer: Tokenizer, talk: Sequence[Turn], generate: bool) -> str:
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=generate)
    bos = getattr(tokenizer, "bos_token", None)
    return text.removeprefix(bos) if bos else text


def _cut(text: str, *marks: str) -> list[str]:
    """What stands around the marks.

    Raises:
        ValueError: one of them is not there exactly once.
    """
    parts = []
    for mark in marks:
        part, text = text.split(mark)
        parts.append(part)
    return [*parts, text]
