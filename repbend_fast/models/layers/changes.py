"""Changes of a loaded model that can be undone: every mechanism that alters one makes them through ``Changes``."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Changes:
    """What was changed, in order. ``undo`` takes it back from the last to the first, also what a mechanism did before
    it failed.

    What was changed by others meanwhile stays, unless it stands in the same place.
    """

    def __init__(self) -> None:
        self._undo = ExitStack()

    def entry(self, table: MutableMapping[str, Any], name: str, value: object) -> None:
        """Set ``table[name]``: an attribute of one module (``vars(module)``), or a buffer of it."""
        self._undo.callback(_put_back, table, name, name in table, table.get(name))
        table[name] = value

    def kind(self, module: object, kind: type) -> None:
        """Give ``module`` another class."""
        self._undo.callback(setattr, module, "__class__", type(module))
        module.__class__ = kind

    def attribute(self, target: object, name: str, value: object) -> None:
        """Set an attribute that ``target`` has."""
        self._undo.callback(setattr, target, name, getattr(target, name))
        setattr(target, name, value)

    def place(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Let ``parameter``, which stays the same object, hold equal values elsewhere. Undone, they go back to its
        device.
        """
        self._undo.callback(_send_back, parameter, parameter.device)
        parameter.data = values

    @contextmanager
    def made_by_others(self, module: nn.Module) -> Iterator[None]:
        """Whatever the code inside does to the attributes of ``module`` itself counts as changes."""
        own = vars(module)
        before = dict(own)
        try:
            yield
        finally:
            for name in [
                name
                for name in (*own, *before)
                if name not in own or name not in before or own[name] is not before[name]
            ]:
                self._undo.callback(_put_back, own, name, name in before, before.get(name))

    def undo(self) -> None:
        """Take everything back; a second call finds nothing."""
        self._undo.close()


def _put_back(table: MutableMapping[str, Any], name: str, present: bool, value: object) -> None:
    if present:
        table[name] = value
    else:
        table.pop(name, None)


def _send_back(parameter: nn.Parameter, device: torch.device) -> None:
    parameter.data = parameter.data.to(device)
