"""The schema seen from outside: which keys there are, what each allows, and what a mistyped one may have meant."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from repbend_fast.config.published import NAMES
from repbend_fast.config.schema import Config, Section
from repbend_fast.config.yaml_text import Key
from repbend_fast.errors import UserError
from repbend_fast.objectives.registry import DEFAULT_OBJECTIVE, section_of
from repbend_fast.objectives.sections import MethodConfig

MOST_NAMED = 16  # keys that a message lists: it is to stay a line that can be read
_WORDS: dict[object, str] = {
    Any: "any value",
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


@dataclass(frozen=True)
class Place:
    """Where a key leads in the schema: its path, its annotation with constraints, and the section that follows if it is
    one.

    ``objective`` is the name of the objective in force, which decides the keys of its section.
    """

    path: Key
    annotation: object
    metadata: tuple[object, ...] = ()
    objective: str = DEFAULT_OBJECTIVE

    @property
    def name(self) -> str:
        """Dotted, as a user writes it."""
        return ".".join(str(part) for part in self.path)

    @property
    def section(self) -> type[Section] | None:
        """The section class, for a section, an optional one, and the one of the objective in force."""
        found = [arm for arm in arms(self.annotation) if isinstance(arm, type) and issubclass(arm, Section)]
        if len(found) > 1 and issubclass(found[0], MethodConfig):
            return section_of(self.objective) or found[0]
        return found[0] if found else None

    @property
    def items(self) -> type[Section] | None:
        """The section class of a list's items."""
        for arm in arms(self.annotation):
            inner = get_args(arm)
            if get_origin(arm) is list and isinstance(inner[0], type) and issubclass(inner[0], Section):
                return inner[0]
        return None

    @property
    def is_text(self) -> bool:
        """Whether any text is allowed, so that an override is taken as it is written."""
        return str in arms(self.annotation)

    @property
    def is_open(self) -> bool:
        """Whether keys that no schema knows are allowed below."""
        return any(get_origin(arm) is dict and get_args(arm)[1] is Any for arm in arms(self.annotation))


@cache
def arms(annotation: object) -> tuple[object, ...]:
    """The alternatives of a type, without their ``Annotated`` wrapping."""
    if get_origin(annotation) is Annotated:
        return arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(arm for part in get_args(annotation) for arm in arms(part))
    return (annotation,)


def child(place: Place, part: str | int) -> Place | None:
    """The place one step further, or None where the schema has no such key."""
    if isinstance(part, int):
        return None if place.items is None else Place((*place.path, part), place.items, (), place.objective)
    if place.is_open:
        return Place((*place.path, part), Any, (), place.objective)
    field: FieldInfo | None = None if place.section is None else place.section.model_fields.get(part)
    return (
        None if field is None else Place((*place.path, part), field.annotation, tuple(field.metadata), place.objective)
    )


def locate(path: Key, objective: str = DEFAULT_OBJECTIVE) -> Place:
    """The deepest place of the schema on ``path``: further parts belong to its value."""
    place = Place((), Config, (), objective)
    for part in path:
        following = child(place, part)
        if following is None:
            return place
        place = following
    return place


def children(section: type[Section]) -> list[str]:
    """Key names of a section in their order."""
    return list(section.model_fields)


@cache
def all_keys(objective: str = DEFAULT_OBJECTIVE) -> tuple[str, ...]:
    """Every dotted key with this objective in force, sections included."""

    def walk(place: Place) -> Iterator[str]:
        for key in children(place.section) if place.section else ():
            following = child(place, key)
            if following is not None:
                yield following.name
                yield from walk(following)

    return tuple(walk(locate((), objective)))


def full_name(name: str, objective: str = DEFAULT_OBJECTIVE) -> str:
    """The dotted key that a bare one means.

    Raises:
        UserError: several keys end so, or none does.
    """
    matches = [key for key in all_keys(objective) if key.rpartition(".")[2] == name]
    if len(matches) > 1:
        raise UserError(f"{name} is ambiguous; write one of {', '.join(matches)}")
    if not matches:
        raise UserError(f"unknown key {name}{suggestion(name, objective=objective)}")
    return matches[0]


def suggestion(name: str, among: list[str] | None = None, *, objective: str = DEFAULT_OBJECTIVE) -> str:
    """``; did you mean …?`` or where to look instead."""
    keys = all_keys(objective)
    known = among if among is not None else [*keys, *(key.rpartition(".")[2] for key in keys), *NAMES]
    lower = {key.lower(): key for key in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.65)
    if close:
        return f"; did you mean {lower[close[0]]}?"
    if among is not None:
        return f"; allowed: {_listed(among)}"
    return f"; keys start with {', '.join(children(Config))}"


def _listed(keys: list[str]) -> str:
    """At most ``MOST_NAMED`` keys, and how many more there are."""
    more = len(keys) - MOST_NAMED
    return ", ".join(keys[:MOST_NAMED]) + (f" and {more} more (docs/settings.md)" if more > 0 else "")


def allowed(place: Place) -> str:
    """What a place takes, in words: ``an integer of at least 1, or null``."""
    if place.section is not None:
        return f"a section with the keys {_listed(children(place.section))}" + (
            ", or null" if type(None) in arms(place.annotation) else ""
        )
    return _describe(place.annotation, place.metadata)


def _describe(annotation: object, metadata: tuple[object, ...] = ()) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = tuple(m for part in inner[1:] for m in (part.metadata if isinstance(part, FieldInfo) else (part,)))
        return _describe(inner[0], (*extra, *metadata))
    if origin in (Union, types.UnionType):
        return ", or ".join(_describe(part, metadata if part is not type(None) else ()) for part in inner)
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(str(value) for value in inner)
    if origin is list:
        least = next((m.min_length for m in metadata if isinstance(m, MinLen)), 0)
        items = (
            "sources"
            if isinstance(inner[0], type) and issubclass(inner[0], Section)
            else f"values, each {_describe(inner[0])}"
        )
        return f"a list of {items}" + (f", at least {least}" if least else "")
    if origin is dict and annotation != dict[str, Any]:
        return f"a mapping of {_describe(inner[0])} to {_describe(inner[1])}"
    if origin is dict:
        return "a mapping"
    if origin is tuple:
        return f"a list of {len(inner)} values, each {_describe(inner[0])}"
    return " ".join([_WORDS.get(annotation, str(annotation)), *_range(metadata)])


def _range(metadata: tuple[object, ...]) -> Iterator[str]:
    bounds: list[str] = []
    for m in metadata:
        if isinstance(m, Ge):
            bounds.append(f"at least {m.ge}")
        elif isinstance(m, Gt):
            bounds.append(f"more than {m.gt}")
        elif isinstance(m, Le):
            bounds.append(f"at most {m.le}")
        elif isinstance(m, Lt):
            bounds.append(f"less than {m.lt}")
    if bounds:
        yield "of " + " and ".join(bounds)
