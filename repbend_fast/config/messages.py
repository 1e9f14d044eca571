"""One clear line for a configuration that does not validate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pydantic import ValidationError

from repbend_fast.config.keys import Place, allowed, children, locate, suggestion
from repbend_fast.config.yaml_text import Key
from repbend_fast.objectives.registry import CUSTOM, DEFAULT_OBJECTIVE, SETTINGS

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


@dataclass(frozen=True)
class Origin:
    """Where a value was written: the key as spelled there, and ``file:line`` (empty for the command line)."""

    spelled: str
    where: str = ""

    @property
    def prefix(self) -> str:
        """``file:line: `` or nothing."""
        return f"{self.where}: " if self.where else ""


def show(value: object) -> str:
    """A value as a user writes it, shortened."""
    text = value if isinstance(value, str) and value and "\n" not in value else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def explain(
    error: ValidationError, origins: Mapping[Key, Origin], name: str, objective: str = DEFAULT_OBJECTIVE
) -> str:
    """The first error of a validation, with the place where the value was written and what is allowed.

    Args:
        error: What pydantic raised for the whole configuration.
        origins: Where values were written, by path.
        name: The recipe, for a key that is written nowhere.
        objective: Name of the objective in force.
    """
    found = [cast("ErrorDetails", {**e, "loc": _untagged(e["loc"])}) for e in error.errors(include_url=False)]
    # A misspelt key explains a missing one, never the other way round.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    kind, path, value = first["type"], tuple(first["loc"]), first["input"]
    if kind.startswith("union_tag"):
        path, value = ("objective", "name"), value.get("name") if isinstance(value, dict) else value
        spelled = _origin(origins, path) or Origin("objective.name", name)
        near = suggestion(value, list(SETTINGS)) if isinstance(value, str) else ""
        return (
            f"{spelled.prefix}{spelled.spelled}={show(value)}: must be one of {', '.join(SETTINGS)}, or module:Class "
            "of your own" + (near if "did you mean" in near else "")
        )
    if kind == "value_error" and not path:
        return f"{name}: {_reason(first)}"
    place = locate(path, objective)
    if kind == "extra_forbidden":
        origin = _origin(origins, path) or Origin(str(path[-1]), name)
        known = children(place.section) if place.section else []
        return f"{origin.prefix}unknown key {'.'.join(map(str, path))}{suggestion(str(path[-1]), known)}"
    if kind == "missing" and path == place.path:
        required = (
            [key for key, field in place.section.model_fields.items() if field.is_required()] if place.section else []
        )
        if required:
            key = locate((*path, required[0]), objective)
            return f"{name}: {place.name} is missing; set {key.name}, which must be {allowed(key)}"
        in_list = any(isinstance(part, int) for part in path)
        how = "" if in_list else f"set it in a recipe or as {place.name}=VALUE; "
        return f"{name}: {place.name} is missing; {how}it must be {allowed(place)}"
    return _wrong_value(place, _whole_value(place, path, value, found), _origin(origins, path), name, first)


def _untagged(path: tuple[int | str, ...]) -> Key:
    """pydantic puts the objective's name between the section and its keys."""
    return (path[0], *path[2:]) if len(path) > 1 and path[0] == "objective" and path[1] in (*SETTINGS, CUSTOM) else path


def _wrong_value(place: Place, value: object, origin: Origin | None, name: str, error: ErrorDetails) -> str:
    prefix = origin.prefix if origin else f"{name}: "
    spelled = origin.spelled if origin else place.name
    must = _reason(error) if error["type"] == "value_error" else f"must be {allowed(place)}"
    subject = "" if spelled == place.name else f"{place.name} "
    hint = suggestion(value, _choices(place)) if isinstance(value, str) and _choices(place) else ""
    return f"{prefix}{spelled}={show(value)}: {subject}{must}" + (hint if "did you mean" in hint else "")


def _whole_value(place: Place, path: Key, value: object, found: list[ErrorDetails]) -> object:
    """For a bad item of a list: the list where pydantic shows it (the other alternative's error does), else
    the item.
    """
    for other in found:
        loc = tuple(other["loc"])
        if loc[: len(place.path)] == place.path and len(loc) < len(path) and not isinstance(loc[-1], int):
            return other["input"]
    return value


def _choices(place: Place) -> list[str]:
    text = allowed(place)
    return [word.strip() for word in text.removeprefix("one of ").split(",")] if text.startswith("one of ") else []


def _origin(origins: Mapping[Key, Origin], path: Key) -> Origin | None:
    for end in range(len(path), 0, -1):
        if path[:end] in origins:
            return origins[path[:end]]
    return None


def _reason(error: ErrorDetails) -> str:
    context = error.get("ctx", {}).get("error")
    return str(context) if context is not None else str(error["msg"])
