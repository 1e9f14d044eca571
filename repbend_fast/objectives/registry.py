"""The methods by name. A file of this folder enters its own, with ``@method`` on the class that makes the streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar, Union

from pydantic import Discriminator, Tag

from repbend_fast.objectives.adversarial import PREFIX
from repbend_fast.objectives.custom import CustomObjectiveConfig
from repbend_fast.objectives.sections import MethodConfig

DEFAULT_OBJECTIVE = "repbend"
CUSTOM = "custom"
"""Stands for all objectives of the user's own."""

SETTINGS: dict[str, type[MethodConfig]] = {}
"""The settings of each method, in the order of their places."""
OBJECTIVES: dict[str, type] = {}
"""The classes, called as ``Class(settings, num_blocks, steps, seed)``, in the same order."""

C = TypeVar("C", bound=type)


def method(settings: type[MethodConfig]) -> Callable[[C], C]:
    """Class decorator: enter an :class:`~repbend_fast.objectives.base.Objective` under the name that its ``settings``
    have.
    """

    def enter(objective: C) -> C:
        name = settings.model_fields["name"].default
        SETTINGS[name], OBJECTIVES[name] = settings, objective
        for table in (SETTINGS, OBJECTIVES):
            entries = sorted(table.items(), key=lambda entry: SETTINGS[entry[0]].place)
            table.clear()
            table.update(entries)
        return objective

    return enter


def section_of(name: object) -> type[MethodConfig] | None:
    """The settings' class of the objective ``name``, None for an unknown one."""
    if not isinstance(name, str):
        return None
    return CustomObjectiveConfig if ":" in name else SETTINGS.get(name)


def default_settings() -> MethodConfig:
    """Those of a recipe without a section ``objective``."""
    return SETTINGS[DEFAULT_OBJECTIVE]()  # type: ignore[call-arg]


def any_settings() -> Any:
    """The type of the section ``objective``: the settings of every method, told apart by their name."""
    tagged = [Annotated[settings, Tag(name)] for name, settings in (*SETTINGS.items(), (CUSTOM, CustomObjectiveConfig))]
    return Annotated[Union[tuple(tagged)], Discriminator(_tag)]  # noqa: UP007


def stream_names() -> set[str]:
    """The streams that any method has."""
    return {name for settings in SETTINGS.values() for name in settings.stream_names or ()}


def titles_of(name: object) -> dict[str, str]:
    """Titles of terms by name, those of the objective ``name`` first; an objective of one's own may name its terms as
    others do.
    """
    own = section_of(name)
    found = dict(own.titles) if own else {}
    for settings in SETTINGS.values():
        for term, title in settings.titles.items():
            found.setdefault(term, title)
    return found | {PREFIX + term: f"{title}, perturbed" for term, title in found.items() if PREFIX + term not in found}


def _tag(value: object) -> str | None:
    name = value.get("name", DEFAULT_OBJECTIVE) if isinstance(value, dict) else getattr(value, "name", None)
    if not isinstance(name, str):
        return None
    return CUSTOM if ":" in name else name
