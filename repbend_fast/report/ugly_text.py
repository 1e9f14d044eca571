"""Text from models, prompts and files, made fit for a page: nothing in it may break the page or what stands beside it.

Escaping is the template's; here are the characters that escaping lets through.
"""

from __future__ import annotations

import re
from typing import overload

from markupsafe import Markup

# No parser of HTML takes these, and UTF-8 has no bytes for a lone surrogate.
_BROKEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
SHORT = 80


@overload
def clean(value: str) -> str: ...
@overload
def clean(value: object) -> object: ...
def clean(value: object) -> object:
    """A string without characters that a page cannot hold, each shown as �; anything else as it is."""
    return _BROKEN.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def short(text: object, most: int = SHORT) -> str:
    """A name on one line, for places that have no elements to isolate it: no marks of direction, at most ``most``
    characters.
    """
    line = " ".join(_DIRECTION.sub("", clean(str(text))).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def name(text: object) -> Markup:
    """A name inside of a sentence: clipped, escaped, and isolated, so that its direction ends with it."""
    return Markup("<bdi>{}</bdi>").format(short(text))
