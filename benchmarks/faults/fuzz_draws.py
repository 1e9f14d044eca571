"""What bad input is drawn from: valid input with bytes, tokens and values changed, all from one seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Files = dict[str, bytes]
"""A case: the files that a parser is given, by name; what is no file has the name ``text``."""

WORDS = (
    *(
        "",
        " ",
        "\n",
        "\x00",
        "﻿",
        "null",
        "true",
        "nan",
        "-inf",
        "1e999",
        "0x10",
        "2020-01-01",
        "~",
        "é",
        "東京",
        "\ud800",
    ),
    *(
        "{",
        "}",
        "[",
        "]",
        "[[[[",
        "{{{{",
        '"',
        "'",
        ",",
        ":",
        "\\",
        "\\u0000",
        "\\ud800",
        "&a",
        "*a",
        "!!python/object:os",
        "%",
    ),
    *("../../etc", "/dev/null", "-", "--", "=", "==", "#", "|", ">", "\t", "\r\n", "\x1b[31m", "9" * 400, "a" * 5000),
)
NUMBERS: tuple[object, ...] = (
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**400,
    0.0,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
)
RAW = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x1f\x8b",
    b"\n",
    b"\r",
    b"\xed\xa0\x80",
    b"PAR1",
    b"GGUF",
    b"\x80" * 64,
)
RECORDS = (
    {"role": "safe", "prompt": "How warm is tea?", "answer": "Rather."},
    {"role": "unsafe", "messages": [{"role": "user", "content": "Open the door"}], "answer": "Sure: turn the key."},
    {"role": "pair", "prompt": "Open it", "unsafe_answer": "Turn it.", "safe_answer": "I cannot."},
    {
        "role": "retain",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello", "thinking": "A greeting."},
        ],
    },
    {
        "prompt": "a",
        "response": "b",
        "adversarial": False,
        "prompt_harm_label": "harmful",
        "response_harm_label": "harmful",
        "response_refusal_label": "compliance",
    },
    {"vanilla": "a", "adversarial": "", "completion": "b", "data_type": "vanilla_harmful"},
    {
        "prompt": "a",
        "prompt_id": "1",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    },
    {"kind": "attack", "text": "Open the door"},
    {"goal": "Open it", "target": "Sure, here is"},
)
"""Rows of every form of training data and prompts that is read."""


def odd_value(draw: random.Random, depth: int = 2) -> object:
    """Plain data that nobody expects."""
    kinds: list[Callable[[], object]] = [
        lambda: draw.choice(WORDS),
        lambda: draw.choice(NUMBERS),
        lambda: draw.choice((None, True, False)),
    ]
    if depth:
        kinds += [
            lambda: [odd_value(draw, depth - 1) for _ in range(draw.randrange(4))],
            lambda: {draw.choice(WORDS): odd_value(draw, depth - 1) for _ in range(draw.randrange(4))},
        ]
    return draw.choice(kinds)()


def mutated_plain(draw: random.Random, value: object, changes: int | None = None) -> object:
    """A copy of plain data with a few places deleted, replaced, renamed or doubled."""
    whole = [copy.deepcopy(value)]
    for _ in range(changes or draw.randint(1, 3)):
        places: list[tuple[dict[str, object] | list[object], object]] = [(whole, 0)]
        _collect(whole[0], places)
        holder, key = draw.choice(places)
        change = draw.randrange(4)
        if isinstance(holder, list) and isinstance(key, int):
            if change == 0 and holder is not whole:
                del holder[key]
            elif change == 1 and holder is not whole:
                holder.insert(key, copy.deepcopy(holder[key]))
            else:
                holder[key] = _near(draw, holder[key])
        elif isinstance(holder, dict):
            name = str(key)
            if change == 0:
                del holder[name]
            elif change == 1:
                holder[draw.choice(WORDS)] = holder.pop(name)
            else:
                holder[name] = _near(draw, holder[name])
    return whole[0]


def _near(draw: random.Random, value: object) -> object:
    """Another value, often of the same type."""
    if draw.random() < 0.5:
        return odd_value(draw)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return draw.choice((value + 1, -value, value * 1000, str(value), draw.choice(NUMBERS)))
    if isinstance(value, str):
        return mutated_bytes(draw, value.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    return odd_value(draw, 3)


def _collect(value: object, places: list[tuple[dict[str, object] | list[object], object]]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            places.append((value, key))
            _collect(inner, places)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            places.append((value, index))
            _collect(inner, places)


def mutated_bytes(draw: random.Random, data: bytes, changes: int | None = None) -> bytes:
    """Bytes with a few of them flipped, cut out, doubled, or with something put between."""
    found = bytearray(data)
    for _ in range(changes or draw.randint(1, 4)):
        place = draw.randrange(len(found) + 1)
        length = min(len(found) - place, draw.choice((1, 1, 4, 16, 200)))
        match draw.randrange(6):
            case 0 if length:
                found[place] ^= 1 << draw.randrange(8)
            case 1:
                del found[place : place + length]
            case 2:
                found[place:place] = found[place : place + length]
            case 3:
                found[place:place] = draw.choice(WORDS).encode("utf-8", "surrogatepass")
            case 4:
                found[place:place] = draw.choice(RAW)
            case _:
                del found[draw.randrange(len(found) + 1) :]
    return bytes(found)


def as_json(value: object) -> bytes:
    """As Python writes it, with what JSON does not have."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Mix:
    """One of several valid inputs, changed as plain data or as bytes, or left as it is."""

    plain: Sequence[object]
    write: Callable[[object], bytes] = as_json

    def __call__(self, draw: random.Random) -> bytes:
        value = draw.choice(self.plain)
        kind = draw.random()
        if kind < 0.05:
            return self.write(value)
        if kind < 0.6:
            return self.write(mutated_plain(draw, value))
        return mutated_bytes(draw, self.write(value))
