"""Every setting of a recipe as a page: ``python -m repbend_fast.config.settings_page > docs/settings.md``.

It is made from the types and descriptions that the settings are checked by, so it cannot say anything else than they
do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from repbend_fast.config.schema import Config
from repbend_fast.objectives.registry import SETTINGS

_HEAD = """\
# Settings

Every key of a recipe: the values that it takes, its default, and what it means. `repbend-fast train RECIPE --dry-run`
prints them with a recipe's own values. An override is `key=value` or `--name value`, and the last word of a key is
enough where it is unambiguous. The names of the published `train.sh` are known too ([running.md](running.md)).

This page is made by `python -m repbend_fast.config.settings_page`.
"""
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "none"}

Schema = Mapping[str, Any]


def settings_page() -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    for name, field in Config.model_fields.items():
        if name == "objective":
            lines += _objectives()
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += _section(f"## `{name}`", name, field.annotation)
    return "\n".join(lines) + "\n"


def _objectives() -> Iterator[str]:
    yield "## `objective`\n\nThe other keys of the section depend on `objective.name`: one of the methods below, or\n"
    yield "`module:Class` of your own ([objectives.md](objectives.md)), which takes its own.\n"
    for name, settings in SETTINGS.items():
        yield from _section(f"### `objective.name={name}`", "objective", settings)


def _section(title: str, prefix: str, settings: type[BaseModel]) -> Iterator[str]:
    schema = settings.model_json_schema()
    first = (settings.__doc__ or "").strip().partition("\n\n")[0]
    yield f"{title}\n\n{' '.join(first.split())}\n"
    # A method's name stands in the title.
    yield from (line for line in _keys(prefix, schema, schema) if not line.startswith("- `objective.name`"))
    yield ""


def _keys(prefix: str, section: Schema, schema: Schema) -> Iterator[str]:
    """A line for each key of ``section``, and for each key of a section within it."""
    known = schema.get("$defs", {})
    for key, entry in section["properties"].items():
        required = key in section.get("required", ())
        default = "required" if required else f"default {_default(entry)}"
        meaning = f": {entry['description']}" if entry.get("description") else ""
        yield f"- `{prefix}.{key}` ({_values(entry, known)}; {default}){meaning}"
        for inner in _sections_within(entry, known):
            yield from _keys(f"{prefix}.{key}", inner, schema)


def _sections_within(entry: Schema, known: Schema) -> Iterator[Schema]:
    for each in (entry, *entry.get("anyOf", ()), entry.get("items", {})):
        if "$ref" in each:
            yield known[each["$ref"].rpartition("/")[2]]


def _values(entry: Schema, known: Schema) -> str:
    """What a key takes, in words."""
    if "$ref" in entry:
        return _values(known[entry["$ref"].rpartition("/")[2]], known)
    if "anyOf" in entry:
        return ", or ".join(dict.fromkeys(_values(each, known) for each in entry["anyOf"]))
    if "allOf" in entry:
        return _values(entry["allOf"][0], known)
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{_shown(entry['const'])}`"
    kind = entry.get("type")
    if kind == "array":
        within = entry.get("items") or {}
        return f"list of {_values(within, known)}{'s' * ('$ref' in within)}" if within else "list"
    if kind == "object":
        return "section" if "properties" in entry else "mapping"
    bounds = " and ".join(f"{sign} {entry[key]:g}" for key, sign in _BOUNDS.items() if key in entry)
    return " ".join(filter(None, [_TYPES.get(str(kind), "any value"), bounds]))


def _default(entry: Schema) -> str:
    return f"`{_shown(entry['default'])}`" if entry.get("default", "") != "" else "empty"


def _shown(value: object) -> str:
    """A default as YAML has it on one line."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    print(settings_page(), end="")
