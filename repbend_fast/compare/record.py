"""What ``compare.json`` holds, as types."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from repbend_fast.evaluation.rates import Side


class SettingsRecord(TypedDict):
    """What was equal for all methods, and what was compared."""

    model: str
    steps: int
    batch: int
    validation_every: int
    seeds: list[int]
    rates: list[float]
    recipe_rates: bool
    recipes: list[str]
    overrides: list[str]
    overlays: list[str]
    jobs: int


class SearchRecord(TypedDict):
    """How the learning rate of a method was chosen."""

    chosen: float
    why: str
    runs: list[dict[str, object]]


class MethodRecord(TypedDict):
    """A method over its seeds: each seed's own values, their median by measure, and lowest and highest. ``kind``:
    bending, unlearning or adversarial.
    """

    name: str
    kind: NotRequired[str]
    recipe: str
    learning_rate: float
    seeds: list[Side]
    median: dict[str, float]
    spread: dict[str, list[float]]


class ComparisonRecord(TypedDict):
    """The whole. ``search`` is by recipe."""

    environment: dict[str, object]
    settings: SettingsRecord
    search: dict[str, SearchRecord]
    methods: list[MethodRecord]
    before: Side
