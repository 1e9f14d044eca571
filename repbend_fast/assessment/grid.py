"""In which ways an attacker fine-tunes: the points of a grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

from repbend_fast.errors import UserError

Kind = Literal["harmful", "benign"]
Value = str | bool | int | float
"""Of an axis."""


@dataclass(frozen=True)
class Point:
    """One training. ``kind``: on complying answers, or on ordinary ones. ``template``: through the chat template."""

    kind: Kind
    records: int
    learning_rate: float
    rank: int
    template: bool


@dataclass(frozen=True)
class Grid:
    """Every combination is a point. ``steps`` are no axis: the learning rate is constant, so a training of the last of
    them passes through the others.
    """

    kinds: tuple[Kind, ...]
    records: tuple[int, ...]
    learning_rates: tuple[float, ...]
    ranks: tuple[int, ...]
    steps: tuple[int, ...]
    template: tuple[bool, ...]

    def points(self) -> Iterator[Point]:
        """All points, in a fixed order."""
        for values in product(self.kinds, self.template, self.records, self.ranks, self.learning_rates):
            kind, template, records, rank, rate = values
            yield Point(kind, records, rate, rank, template)

    def changed(self, **axes: Sequence[Value] | None) -> Grid:
        """With those axes that are given in place of this grid's.

        Raises:
            UserError: names the setting and what it takes.
        """
        return replace(self, **{name: _axis(name, values) for name, values in axes.items() if values is not None})


SMALL = Grid(("harmful", "benign"), (64,), (1e-4, 1e-3), (16,), (8, 32), (True,))
LARGE = Grid(
    ("harmful", "benign"), (16, 64, 256), (1e-6, 1e-5, 1e-4, 1e-3), (8, 16, 64), (16, 64, 128, 512), (True, False)
)
"""Of the size that published attackers sweep."""
WORDS = {"kinds": "harmful, benign or both", "template": "true, false or both", "learning_rates": "numbers above 0"}


def _axis(name: str, values: Sequence[Value]) -> tuple[Any, ...]:
    what = WORDS.get(name, "whole numbers from 1 on")
    if not values or not all(_fits(name, value) for value in values):
        raise UserError(f"relearning: {name}={','.join(map(str, values))}; give {what}")
    return tuple(sorted(set(values))) if name == "steps" else tuple(dict.fromkeys(values))


def _fits(name: str, value: Value) -> bool:
    if name == "kinds":
        return value in get_args(Kind)
    if name == "template":
        return isinstance(value, bool)
    if name == "learning_rates":
        return not isinstance(value, str) and value > 0 and math.isfinite(value)
    return isinstance(value, int) and value >= 1
