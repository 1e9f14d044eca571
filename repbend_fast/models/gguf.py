"""The depth of a model in a GGUF file, from the first kilobytes of its header: its own reader takes seconds for the
vocabulary behind.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 20


def gguf_blocks(path: Path) -> int | None:
    """Decoder blocks by ``ARCHITECTURE.block_count``; None where the header does not say so in a form that is known."""
    try:
        with path.open("rb") as file:
            return _blocks(file)
    except (OSError, struct.error, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # loading the model says what is wrong with it


def _blocks(file: IO[bytes]) -> int | None:
    if file.read(4) != b"GGUF" or _number(file, "I") < 2:
        return None
    _number(file, "Q")
    architecture = None
    for _ in range(_number(file, "Q")):
        key, value = _text(file), _value(file, _number(file, "I"))
        if key == "general.architecture":
            architecture = value
        elif architecture and key == f"{architecture}.block_count":
            return int(value)
    return None


def _value(file: IO[bytes], kind: int) -> Any:
    """One value; arrays, which hold the vocabulary, are passed over as None."""
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        return _number(file, _NUMBERS[kind])
    inner, count = _number(file, "I"), _number(file, "Q")
    if inner in _NUMBERS:
        file.seek(count * struct.calcsize(_NUMBERS[inner]), 1)
    else:
        for _ in range(count):
            _value(file, inner)
    return None


def _number(file: IO[bytes], form: str) -> Any:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]


def _text(file: IO[bytes]) -> str:
    length = _number(file, "Q")
    if length > _LONGEST:
        raise ValueError("no GGUF header")
    return file.read(length).decode("utf-8", errors="replace")
