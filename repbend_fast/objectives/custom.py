"""Objectives of the user's own: ``objective.name: module:Class``.

The class is called as ``Class(settings, num_blocks, steps)`` and is an :class:`~repbend_fast.objectives.base.Objective`; its
``roles`` must be an attribute of the class, because data is read before the model. ``settings`` is the mapping
``objective.settings`` as written. docs/objectives.md describes both, examples/refuse_and_reroute.py is one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from repbend_fast.data.records import ROLES, Batch
from repbend_fast.errors import UserError, one_line
from repbend_fast.objectives.base import Stream


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
            f"objective.name={name}: {module_name} cannot be imported ({one_line(error)}); it is looked for in {here} too"
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
        found = self._checked(self._own.streams(batch, step), "streams")
        if not found:
            raise UserError(f"objective.name={self._name}: streams gives none for a batch, so that there is nothing to train on")
        return found

    def probes(self, batch: Batch) -> list[Stream]:
        """The objective's probes, checked alike."""
        return self._checked(self._own.probes(batch), "probes")

    def _checked(self, streams: Iterable[Stream], method: str) -> list[Stream]:
        found = list(streams)
        for stream in found:
            wrong = _what_is_wrong(stream, self._blocks)
            if (stream.head or stream.answers) and not self._own.uses_head:
                wrong = "it reads logits, and uses_head is false"
            if wrong:
                raise UserError(f"objective.name={self._name}: {method}: stream {stream.name}: {wrong}")
        return found


def _what_is_wrong(stream: Stream, blocks: int) -> str | None:
    from repbend_kernels import KINDS  # brings torch, which reading a configuration does without

    halves = stream.triplets.halves if stream.triplets else ()
    spanned = [term for term in (*stream.distances, stream.head, *halves, stream.answers) if term is not None]
    if not stream.sequences:
        return "it has no sequences; leave it out where there are none"
    if not spanned and stream.pairwise is None:
        return "it has no term; leave it out where it has none"
    beyond = [layer for layer in stream.layers if not 0 <= layer <= blocks]
    if beyond or not stream.stop(blocks):
        return f"hidden states {', '.join(map(str, beyond or stream.layers))} cannot be bent; the model has 1 … {blocks}"
    for term in spanned:
        lengths = [len(sequence) for sequence in stream.sequences]
        if len(term.spans) != len(lengths):
            return f"term {term.name} has {len(term.spans)} spans for {len(lengths)} sequences"
        for (start, stop), length in zip(term.spans, lengths):
            if not 0 <= start <= stop <= length:
                return f"term {term.name} has the span ({start}, {stop}) in a sequence of {length} tokens"
        if not term.denominator > 0:
            return f"term {term.name} has the denominator {term.denominator:g}; it must be above 0"
    for distance in stream.distances:
        if distance.kind not in KINDS:
            return f"term {distance.name} is of kind {distance.kind!r}; there are {', '.join(KINDS)}"
        if distance.limit is not None and distance.kind != "l2":
            return f"term {distance.name} has a limit, which only kind 'l2' can have"
    return None
