"""Overrides: ``key=value``, ``--name value``, ``--name=value`` and bare ``--flag`` of a command line, or a mapping from
Python.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from repbend_fast.config.yaml_text import check_text, is_quoted, parse_value
from repbend_fast.errors import UserError
from repbend_fast.words import is_assignment, takes_value

Overrides = Mapping[str, object] | Sequence[str] | str
"""Settings by key, ``{"training.steps": 60}``, or as a command line has them, ``["training.steps=60"]``."""
Overlays = Sequence[str | os.PathLike[str]] | str | os.PathLike[str]
"""Names of shipped overlays or paths of YAML files, in their order; one alone needs no list."""


@dataclass(frozen=True)
class Override:
    """One setting: ``spelled`` for messages, ``name`` with underscores, its ``value``, and its ``text`` if it was typed
    as such.
    """

    spelled: str
    name: str
    value: object
    text: str | None = None

    def as_text(self) -> object:
        """What a setting that is text takes: the words as they were typed, such as ``1e3``. Quotes around all of them
        are YAML's, and escapes within them are read, as in a recipe: ``"\\n"`` is a line's end.
        """
        if self.text is None or (isinstance(self.value, str) and self.text[:1] in "'\"" and is_quoted(self.text)):
            return self.value
        # `#x` alone is a comment to YAML, and text here.
        return None if self.value is None and not self.text.startswith("#") else self.text


def parse_overrides(overrides: Overrides) -> list[Override]:
    """The settings of a mapping, or of a command line's tokens, in their order.

    Raises:
        UserError: a token that is neither ``key=value`` nor an option, a key of a mapping that is no text, or what
            ``check_text`` refuses.
    """
    if isinstance(overrides, Mapping):
        return [_given(key, value) for key, value in overrides.items()]
    tokens = [overrides] if isinstance(overrides, str) else list(overrides)
    found: list[Override] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        check_text(token, "")
        if token.startswith("--") and len(token) > 2:
            option, equals, text = token.partition("=")
            if not equals and takes_value(tokens, i):
                i += 1
                text = tokens[i]
                check_text(text, f"{token}=")
            elif not equals:
                text = "True"
            found.append(_typed(option, option[2:], text))
        elif is_assignment(token):
            key, _, text = token.partition("=")
            found.append(_typed(key, key, text))
        else:
            raise UserError(f"{token}: expected key=value or --name value")
        i += 1
    return found


def _typed(spelled: str, name: str, text: str) -> Override:
    try:
        value = parse_value(text)
    except yaml.YAMLError:
        value = text
    return Override(spelled, name.replace("-", "_"), value, text)


def _given(key: object, value: object) -> Override:
    if not isinstance(key, str):
        raise UserError(f"{key!r}: a key of the overrides must be text, such as training.steps")
    check_text(key, "")
    return Override(key, key, _plain(value, f"{key}="))


def _plain(value: object, prefix: str) -> object:
    """What YAML would hold in the place of Python's own kinds."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        check_text(value, prefix)
    if isinstance(value, Mapping):
        return {key: _plain(inner, prefix) for key, inner in value.items()}
    return [_plain(inner, prefix) for inner in value] if isinstance(value, list | tuple) else value
