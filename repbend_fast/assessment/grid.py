"""In which ways an attacker fine-tunes: the points of a grid, and how settings write one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

from repbend_fast.errors import UserError

Kind = Literal["harmful", "benign"]


@dataclass(frozen=True)
class Point:
    """One training. ``kind``: on complying answers, or on ordinary ones."""

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

    def changed(self, **written: str) -> Grid:
        """With those axes that are not empty in place of this grid's.

        Raises:
            UserError: names the setting and what it takes.
        """
        axes = {name: _axis(name, text) for name, text in written.items() if text}
        return replace(self, **axes)


SMALL = Grid(("harmful", "benign"), (64,), (1e-4, 1e-3), (16,), (8, 32), (True,))
LARGE = Grid(
    ("harmful", "benign"), (16, 64, 256), (1e-6, 1e-5, 1e-4, 1e-3), (8, 16, 64), (16, 64, 128, 512), (True, False)
)
"""Of the size that published attackers sweep."""


def _axis(name: str, text: str) -> tuple[Any, ...]:
    convert, what = READERS[name]
    try:
        values = [convert(word.strip()) for word in text.split("/")]
    except (ValueError, KeyError):
        raise UserError(f"relearning: {name}={text}; give {what}, joined by /") from None
    return tuple(sorted(set(values))) if name == "steps" else tuple(dict.fromkeys(values))


def _kind(word: str) -> str:
    if word not in get_args(Kind):
        raise ValueError(word)
    return word


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(word: str) -> Any:
        value = kind(word)
        if not 0 < value < float("inf"):
            raise ValueError(word)
        return value

    return read


READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "kinds": (_kind, "harmful and benign"),
    "records": (_positive(int), "whole numbers from 1 on"),
    "learning_rates": (_positive(float), "numbers above 0"),
    "ranks": (_positive(int), "whole numbers from 1 on"),
    "steps": (_positive(int), "whole numbers from 1 on"),
    "template": ({"yes": True, "no": False}.__getitem__, "yes and no"),
}
