"""Adapted layers that read one tensor, as q, k and v do: one dropout mask and one down product for all of them.

Which layers those are is said by their names, so that masks are the same from the first pass on and after resuming.
Whether they do read one tensor is seen at each call: the first of them to be called makes the products of all, the
others take theirs if it is the same x that they are given, and make their own otherwise, under the same mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from torch import Tensor, nn

SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Names, within one parent, of layers that read one tensor."""

Layer = TypeVar("Layer", bound=nn.Module)
Made = TypeVar("Made")


class Readers(Generic[Layer, Made]):
    """Layers that should read one tensor, and what the first of them made for the others.

    Attributes:
        layers: in the model's order.
        apart: a layer was given another tensor than those before it: each makes its own from now on.
    """

    def __init__(self, layers: list[Layer]) -> None:
        self.layers, self.apart = layers, False
        self._x: Tensor | None = None
        self._version = 0
        self._waiting: dict[int, Made] = {}

    def taken(self, layer: Layer, x: Tensor) -> Made | None:
        """What another layer made for this one of this very ``x``. Nothing is held once every layer has taken its
        own.
        """
        if id(layer) not in self._waiting:
            return None
        if self._x is not x or self._version != _version_of(x):
            self.apart = self._x is not x
            return None
        made = self._waiting.pop(id(layer))
        if not self._waiting:
            self._x = None
        return made

    def give(self, layer: Layer, x: Tensor, made: Sequence[Made]) -> Made:
        """What is ``layer``'s of what was ``made`` of ``x`` for all layers, in their order; the others' waits."""
        self._waiting = {id(each): part for each, part in zip(self.layers, made)}
        self._x, self._version = x, _version_of(x)
        return self._waiting.pop(id(layer))

    def forget(self) -> None:
        """Hold nothing, whoever has not taken his own: a pass has ended."""
        self._x, self._waiting = None, {}


def _version_of(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def groups_of(names: Iterable[str]) -> list[list[str]]:
    """Paths of layers, those together that share a tensor by their names; in the order given."""
    found: dict[tuple[str, object], list[str]] = {}
    for path in names:
        parent, _, name = path.rpartition(".")
        kind = next((number for number, sharing in enumerate(SHARING) if name in sharing), name)
        found.setdefault((parent, kind), []).append(path)
    return list(found.values())
