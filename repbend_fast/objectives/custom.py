"""Objectives of the user's own: ``objective.name: module:Class``.

The class is called as ``Class(settings, num_blocks, steps)`` and is an :class:`~repbend_fast.objectives.base.Objective`; its
``roles`` must be an attribute of the class, because data is read before the model. ``settings`` is the mapping
``objective.settings`` as written. docs/objectives.md describes both, examples/refuse_and_reroute.py is one.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from repbend_fast.data.records import ROLES
from repbend_fast.errors import UserError


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
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # Whatever the user's module raises is theirs to mend.
        raise UserError(f"objective.name={name}: {module_name} cannot be imported ({reason}); it is looked for in {here} too") from error
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
