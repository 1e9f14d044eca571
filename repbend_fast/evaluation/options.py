"""Attacks and judges by name: ``NAME`` or ``NAME:key=value,key=value``, with the constructor's parameters as keys."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from repbend_fast.errors import UserError, one_line

_NEXT_KEY = re.compile(r",(?=[A-Za-z_]\w*=)")
"""A comma that ends a value: one within a value (``tokens=4,16``) is followed by no key."""
_NOTHING = ("none", "null")


@dataclass(frozen=True)
class Named:
    """One that was asked for. ``label``: its name and the settings that are not the defaults, as records have it."""

    label: str
    kind: type
    settings: Mapping[str, object] = field(default_factory=dict)

    def make(self) -> Any:
        """Build it.

        Raises:
            UserError: settings that it refuses.
        """
        try:
            return self.kind(**self.settings)
        except (ValidationError, ValueError, TypeError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else one_line(error)
            raise UserError(f"{self.label}: {reason}") from error


@dataclass(frozen=True)
class Catalog:
    """What there is by name. ``what``: ``attack`` or ``judge``, for messages. ``places``: ``module:Class`` by name,
    imported when it is asked for; a name whose module is not installed is not there.
    """

    what: str
    places: Mapping[str, str]

    def names(self) -> list[str]:
        """The names that can be asked for, in the catalog's order."""
        return [name for name, place in self.places.items() if importlib.util.find_spec(place.partition(":")[0])]

    def find(self, text: str) -> Named:
        """What ``text`` asks for, its settings read but not yet built.

        Raises:
            UserError: an unknown name or key, or a value of another type.
        """
        name, _, words = text.partition(":")
        names = self.names()
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise UserError(
                f"--{self.what} {name}: no such {self.what}; there {'are' if len(names) > 1 else 'is'} "
                f"{', '.join(names)}{f'; did you mean {near[0]}?' if near else ''}"
            )
        module, _, attribute = self.places[name].partition(":")
        kind = getattr(importlib.import_module(module), attribute)
        settings = _settings(f"--{self.what} {name}", kind, words)
        return Named(_label(name, kind, settings), kind, settings)


def parameters(kind: type[Any]) -> dict[str, tuple[object, object]]:
    """Type and default of every setting that the constructor of ``kind`` takes, by name."""
    hints = typing.get_type_hints(kind.__init__)
    found = list(inspect.signature(kind).parameters.values())
    return {
        p.name: (hints.get(p.name, str), p.default) for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def _settings(where: str, kind: type, words: str) -> dict[str, object]:
    known = parameters(kind)
    settings: dict[str, object] = {}
    for word in _NEXT_KEY.split(words) if words else []:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{where}: {word!r} is no key=value")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(
                f"{where}: unknown setting {key}; it has {', '.join(known) or 'none'}"
                f"{f'; did you mean {near[0]}?' if near else ''}"
            )
        settings[key] = _value(f"{where}: {key}={text}", text, known[key][0])
    return settings


def _value(where: str, text: str, wanted: Any) -> object:
    """``text`` as the type ``wanted``: numbers, truth values, choices, and lists with commas between."""
    if text.lower() in _NOTHING and type(None) in typing.get_args(wanted):
        return None
    try:
        for choice in _choices(wanted):
            if typing.get_origin(choice) in (tuple, list):
                return TypeAdapter(choice).validate_python([part.strip() for part in text.split(",")])
        return TypeAdapter(wanted).validate_strings(text)
    except ValidationError as error:
        raise UserError(f"{where}: {error.errors()[0]['msg']}") from error


def _choices(wanted: object) -> tuple[Any, ...]:
    union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    return typing.get_args(wanted) if union else (wanted,)


def _label(name: str, kind: type, settings: Mapping[str, object]) -> str:
    changed = [
        f"{key}={_shown(settings[key])}"
        for key, (_, default) in parameters(kind).items()
        if key in settings and settings[key] != default
    ]
    return f"{name}:{','.join(changed)}" if changed else name


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return ",".join(map(_shown, value)) if isinstance(value, tuple | list) else str(value)
