"""From a recipe and overrides to a validated :class:`Config`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from repbend_fast import console
from repbend_fast.config import published
from repbend_fast.config.keys import DEFAULT_OBJECTIVE, Place, child, children, full_name, locate, suggestion
from repbend_fast.config.messages import Origin, explain, show
from repbend_fast.config.overrides import Overlays, Override, Overrides, parse_overrides
from repbend_fast.config.schema import Config
from repbend_fast.config.shipped import bare_name, find_overlay, find_recipe
from repbend_fast.config.yaml_text import Key, dump_yaml, read_yaml
from repbend_fast.errors import UserError
from repbend_fast.nearby import own_path

Note = Callable[[str], None]


def load_config(
    recipe: str | os.PathLike[str] | Config,
    overrides: Overrides = (),
    *,
    overlays: Overlays = (),
    defaults: Sequence[str] = (),
    needs_data: bool = True,
    note: Note = console.note,
) -> Config:
    """Resolves and validates the configuration of a run. Reads no weights and no data.

    Args:
        recipe: Name of a shipped recipe, path of a YAML file, or a configuration to start from, which stays as it is.
        overrides: A mapping, ``{"training.steps": 60}``, or ``key=value``, ``--name value`` and ``--name=value``, whose
            values are YAML. A key is dotted (``training.steps``), bare where that is unambiguous (``steps``), or a
            published argument name (``loss_alpha``).
        overlays: Names of shipped overlays (``qlora``) or paths of YAML files, which go on top of the recipe in their
            order.
        defaults: As ``overrides``, which win over them; they win over the recipe.
        needs_data: False where no record will be read: data need not be named then.
        note: Receives one line for each published argument that is accepted without effect.

    Raises:
        UserError: unknown, duplicate or ambiguous key, wrong type, value out of range, impossible combination, missing
            or invalid file. One line that names key, value and what is allowed.
    """
    above = [os.fspath(overlay) for overlay in ([overlays] if isinstance(overlays, str | os.PathLike) else overlays)]
    settings = _Settings(note)
    if isinstance(recipe, Config):
        name = "the configuration"
        settings.tree = recipe.model_dump(mode="json")
    else:
        path, name = find_recipe(os.fspath(recipe))
        settings.add_file(path, name, ())
    for overlay in above:
        settings.add_file(*find_overlay(overlay), (), overlay=True)
    settings.add_overrides(parse_overrides(defaults))
    settings.add_overrides(parse_overrides(overrides))
    if not needs_data:
        settings.name_data()
    settings.name_folder("-".join(map(bare_name, (name, *above))))
    try:
        return Config.model_validate(settings.tree)
    except ValidationError as error:
        raise UserError(explain(error, settings.origins, name, settings.objective)) from None


def resolved_yaml(config: Config) -> str:
    """The whole configuration as YAML that :func:`load_config` reads back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


class _Settings:
    """Nested values from several files and the command line, the later ones winning, each with its origin."""

    def __init__(self, note: Note) -> None:
        self.tree: dict[str, object] = {}
        self.origins: dict[Key, Origin] = {}
        self._note = note
        self._seen: dict[Key, Origin] = {}

    @property
    def objective(self) -> str:
        """Name of the objective in force so far, which decides the keys of its section."""
        section = self.tree.get("objective")
        name = section.get("name", DEFAULT_OBJECTIVE) if isinstance(section, dict) else DEFAULT_OBJECTIVE
        return name if isinstance(name, str) else DEFAULT_OBJECTIVE

    def _locate(self, path: Key) -> Place:
        return locate(path, self.objective)

    def add_file(self, path: Path, name: str, parents: tuple[Path, ...], *, overlay: bool = False) -> None:
        """A recipe on top of its ``base`` and of the overlays that it takes ``with`` it."""
        values, lines = read_yaml(path, name)
        resolved = path.resolve()
        for key, other in _below(values, name, lines):
            if overlay and key == "base":
                raise UserError(
                    f"{name}:{lines[(key,)]}: base={other}: an overlay has no base, it goes on top of a recipe"
                )
            if resolved in parents:
                raise UserError(
                    f"{name}:{lines[(key,)]}: {key}={other}: the recipes inherit from each other in a circle"
                )
            if key == "with":
                self.add_file(*find_overlay(other, beside=path.parent), (*parents, resolved), overlay=True)
            else:
                self.add_file(*find_recipe(other, beside=path.parent), (*parents, resolved))
        self._seen = {}
        self._add_mapping((), values, lambda key: Origin(_dotted(key), f"{name}:{lines[key]}"))

    def add_overrides(self, overrides: list[Override]) -> None:
        """Settings from the command line."""
        self._seen = {}
        # The objective's name decides what the other keys mean.
        for override in sorted(overrides, key=lambda o: o.name != "objective.name"):
            origin = Origin(override.spelled)
            name = published.bare(published.renamed(self.objective).get(override.name, override.name))
            value = override.value
            if name in published.names(self.objective):
                self._add_published((), name, value, origin)
                continue
            path = self._path(name, origin)
            if self._locate(path).is_text:
                value = override.as_text()
            self._add(path, value, origin)

    def name_folder(self, recipe: str) -> None:
        """``runs/RECIPE`` for the run's folder, unless something has named one."""
        output = self.tree.setdefault("output", {})
        if isinstance(output, dict):
            output.setdefault("folder", f"runs/{recipe}")

    def name_data(self) -> None:
        """A place for data that nobody will read, unless something has named some."""
        data = self.tree["data"] = self.tree.get("data") or {}
        if isinstance(data, dict) and not data.get("sources"):
            data["sources"] = [{"path": "no data named", "format": "jsonl"}]

    def _add_mapping(self, path: Key, values: dict[str, object], origin_of: Callable[[Key], Origin]) -> None:
        for key, value in _name_first(path, values).items():
            here = (*path, key)
            if child(self._locate(path), key) is not None:
                self._add(here, value, origin_of(here), origin_of)
            else:
                self._add_by_name(path, key, value, origin_of(here))

    def _add_by_name(self, path: Key, key: str, value: object, origin: Origin) -> None:
        """A key of a file that is none of its section's: a published name or, at the top, a bare or dotted one."""
        place = self._locate(path)
        if key in published.names(self.objective) and (not path or self._leads_into(path, key)):
            self._add_published(path, key, value, origin)
        elif not path:
            self._add(self._path(key, origin), value, origin)
        else:
            known = children(place.section) if place.section else []
            raise UserError(f"{origin.prefix}unknown key {_dotted((*path, key))}{suggestion(key, known)}")

    def _add_published(self, path: Key, name: str, value: object, origin: Origin) -> None:
        try:
            translation = published.translate(name, value, self.objective)
        except published.Refused as refused:
            raise UserError(f"{origin.prefix}{origin.spelled}={show(value)}: must be {refused}") from None
        for text in translation.notes:
            self._note(f"{origin.prefix}{origin.spelled}={show(value)}: {text}")
        for dotted, setting in translation.settings:
            self._add(self._path(dotted, origin), setting, origin)

    def _path(self, name: str, origin: Origin) -> Key:
        """The schema path of a dotted or bare key, list items resolved against what is there."""
        try:
            name = name if "." in name else full_name(name, self.objective)
        except UserError as error:
            raise UserError(f"{origin.prefix}{error}") from None
        place: Place = self._locate(())
        for part in name.split("."):
            following = child(place, self._index(place, part, origin) if place.items is not None else part)
            if following is None:
                if place.section and part in published.renamed(self.objective) and self._leads_into(place.path, part):
                    return tuple(published.renamed(self.objective)[part].split("."))
                known = children(place.section) if place.section else None
                raise UserError(f"{origin.prefix}unknown key {name}{suggestion(part, known)}")
            place = following
        return place.path

    def _index(self, place: Place, part: str, origin: Origin) -> int:
        """Which item of a list of sources is meant: by number, or by format."""
        items: object = self.tree
        for step in place.path:
            items = items.get(step) if isinstance(items, dict) else None
        items = items if isinstance(items, list) else []
        if part.isdigit() and int(part) < len(items):
            return int(part)
        formats = [item.get("format", "auto") if isinstance(item, dict) else "auto" for item in items]
        if formats.count(part) == 1:
            return formats.index(part)
        there = ", ".join(f"{i} ({name})" for i, name in enumerate(formats)) or "none"
        raise UserError(
            f"{origin.prefix}{origin.spelled}: {place.name} has no single item {part}; its items are {there}"
        )

    def _add(self, path: Key, value: object, origin: Origin, origin_of: Callable[[Key], Origin] | None = None) -> None:
        place = self._locate(path)
        if place.section is not None and isinstance(value, dict):
            self._add_mapping(path, value, origin_of or (lambda key: Origin(_dotted(key), origin.where)))
            return
        if path in self._seen:
            raise UserError(
                f"{origin.prefix}{origin.spelled} sets {_dotted(path)} a second time (first: "
                f"{_where(self._seen[path])})"
            )
        self._seen[path] = origin
        if path == ("objective", "name") and value != self.objective:
            self._forget_objective()
        self._put(path, _normal(place, value))
        for old in [key for key in self.origins if key[: len(path)] == path]:
            del self.origins[old]
        self.origins[path] = origin
        if origin_of is not None and isinstance(value, list):
            for inner in _inner_keys(path, value):
                self.origins[inner] = origin_of(inner)

    def _forget_objective(self) -> None:
        """Drop what an earlier file set for another objective: its keys mean nothing to the new one."""
        self.tree.pop("objective", None)
        for old in [key for key in self.origins if key[:1] == ("objective",)]:
            del self.origins[old]

    def _leads_into(self, path: Key, name: str) -> bool:
        """Whether a published name sets something inside the section at ``path``."""
        target = published.renamed(self.objective).get(name) or published.SECTION_OF.get(name, "")
        return target.split(".")[: len(path)] == list(path)

    def _put(self, path: Key, value: object) -> None:
        node: Any = self.tree
        for part in path[:-1]:
            if isinstance(node, dict) and not isinstance(node.get(part), (dict, list)):
                node[part] = {}
            node = node[part]
        node[path[-1]] = value


def _below(values: dict[str, object], name: str, lines: dict[Key, int]) -> list[tuple[str, str]]:
    """What a file goes on top of, the lowest first, each with the key that names it. Takes the keys out of
    ``values``.
    """
    base, overlays = values.pop("base", ()), values.pop("with", ())
    if not isinstance(base, str | tuple):
        raise UserError(f"{name}:{lines[('base',)]}: base={show(base)}: must be a recipe's name or a YAML file")
    overlays = [overlays] if isinstance(overlays, str) else overlays
    if not isinstance(overlays, list | tuple) or not all(isinstance(overlay, str) for overlay in overlays):
        raise UserError(
            f"{name}:{lines[('with',)]}: with={show(overlays)}: must be an overlay's name, a YAML file, or a list of "
            "them"
        )
    return [*([] if base == () else [("base", base)]), *(("with", overlay) for overlay in overlays)]


def _normal(place: Place, value: object) -> object:
    """Shorthands of sources written out, and ``~`` replaced."""
    if place.items is not None and value is not None:
        items = value if isinstance(value, list) else [value]
        return [_normal_source(item) for item in items]
    return _home(value) if place.is_text else value


def _normal_source(item: object) -> object:
    if isinstance(item, str):
        return {"path": _home(item)}
    return {**item, "path": _home(item["path"])} if isinstance(item, dict) and "path" in item else item


def _home(value: object) -> object:
    return str(own_path(value)) if isinstance(value, str) and value.startswith("~") else value


def _name_first(path: Key, values: dict[str, object]) -> dict[str, object]:
    """The section ``objective`` with its name first, which decides what the other keys mean."""
    return {"name": values["name"], **values} if path == ("objective",) and "name" in values else values


def _inner_keys(path: Key, value: object) -> Iterator[Key]:
    parts = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for part, inner in parts:
        yield (*path, part)
        yield from _inner_keys((*path, part), inner)


def _dotted(path: Key) -> str:
    return ".".join(str(part) for part in path)


def _where(origin: Origin) -> str:
    return f"{origin.spelled} in {origin.where}" if origin.where else origin.spelled
