"""Objectives of the user's own: ``objective.name: module:Class``.

The class is called as ``Class(settings, num_blocks, steps)`` and is an
:class:`~repbend_fast.objectives.base.Objective`; its ``roles`` must be an attribute of the class, because data is read
before the model. ``settings`` is the mapping ``objective.settings`` as written. docs/objectives.md describes both,
examples/refuse_and_reroute.py is one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from repbend_fast.data.records import ROLES, Batch, Role
from repbend_fast.errors import UserError, one_line
from repbend_fast.objectives.base import Probes
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.objectives.streams import Stream, StreamError


def load_class(name: str) -> Any:
    """Import ``module:Class``; modules are also looked for in the current folder, as ``python -m`` does.

    Raises:
        UserError: no such module or class, an error while importing it, or a class without ``roles`` or ``streams``.
    """
    module_name, _, class_name = name.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # Whatever the user's module raises is theirs to mend.
        raise UserError(
            f"objective.name={name}: {module_name} cannot be imported ({one_line(error)}); it is looked for in {here} "
            "too"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise UserError(f"objective.name={name}: module {module_name} has no class {class_name}")
    roles = getattr(found, "roles", None)
    if not isinstance(roles, tuple) or not roles or not set(roles) <= set(ROLES):
        raise UserError(f"objective.name={name}: {class_name}.roles must be a tuple of some of {', '.join(ROLES)}")
    missing = [method for method in ("streams", "probes") if not callable(getattr(found, method, None))]
    if missing:
        raise UserError(f"objective.name={name}: {class_name} has no method {' and no method '.join(missing)}")
    return found


class CustomObjectiveConfig(MethodConfig):
    """An objective of your own: ``name: package.module:Class``, its settings under ``settings``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    settings: dict[str, Any] = Field(default_factory=dict, description="Handed to the class as they are.")

    @property
    def needs_pairs(self) -> bool:
        return True

    @property
    def replaceable(self) -> frozenset[str]:
        return frozenset()  # what the class does without a role is not known

    @property
    def roles(self) -> tuple[Role, ...]:
        return tuple(load_class(self.name).roles)

    @property
    def reads_turns(self) -> bool:
        return bool(getattr(load_class(self.name), "reads_turns", False))

    @property
    def counts_in_reference(self) -> bool:
        return True  # whether one of its terms does is seen in its streams


class Checked:
    """An objective of the user's own whose streams are looked at before they run: what they name must be there."""

    def __init__(self, own: Any, name: str, num_blocks: int) -> None:
        self._own, self._name, self._blocks = own, name, num_blocks

    def __getattr__(self, name: str) -> Any:
        if name == "_own":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._own, name)

    def streams(self, batch: Batch, step: int) -> list[Stream]:
        """The objective's streams.

        Raises:
            UserError: there are none, or one that cannot run.
        """
        found = self._checked(lambda: self._own.streams(batch, step), "streams")
        if not found:
            raise UserError(
                f"objective.name={self._name}: streams gives none for a batch, so that there is nothing to train on"
            )
        return found

    def probes(self, batch: Batch) -> Probes:
        """The objective's probes, checked alike.

        Raises:
            UserError: they are no ``Probes``, or have a stream that cannot run.
        """
        made: list[object] = []

        def streams() -> Iterable[Stream]:
            made.append(self._own.probes(batch))
            return made[0] if isinstance(made[0], Probes) else ()

        self._checked(streams, "probes")
        if not isinstance(made[0], Probes):
            raise UserError(
                f"objective.name={self._name}: probes gives a {type(made[0]).__name__}; it must give Probes(bent, "
                "kept), which "
                "repbend_fast.objectives has"
            )
        return made[0]

    def _checked(self, make: Callable[[], Iterable[Stream]], method: str) -> list[Stream]:
        try:
            found = list(make())
        except StreamError as error:
            raise UserError(f"objective.name={self._name}: {method}: {error}") from error
        for stream in found:
            wrong = _what_is_wrong(stream, self._blocks)
            if stream.needs_head and not self._own.uses_head:
                wrong = "it reads logits, and uses_head is false"
            if wrong:
                raise UserError(f"objective.name={self._name}: {method}: stream {stream.name}: {wrong}")
        return found


def _what_is_wrong(stream: Stream, blocks: int) -> str | None:
    if not stream.sequences:
        return "it has no sequences; leave it out where there are none"
    if not stream.terms:
        return "it has no term; leave it out where it has none"
    beyond = [layer for layer in stream.layers if not 0 <= layer <= blocks]
    if beyond or not stream.stop(blocks):
        return (
            f"hidden states {', '.join(map(str, beyond or stream.layers))} cannot be bent; the model has 1 … {blocks}"
        )
    for part in (part for term in stream.terms for part in term.parts):
        if not part.denominator > 0:
            return f"term {part.name} has the denominator {part.denominator:g}; it must be above 0"
    return None
