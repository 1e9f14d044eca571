"""Two checkouts' steps: in which order they run, and what is made of their times."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.step.step_versions import compared, order, summary


def block(side: str, *cpu: float, number: int = 0) -> dict[str, Any]:
    seconds = list(cpu)
    return {"round": number, "levers": "default", "side": side, "cpu": seconds, "wall": seconds, "terms": {}}


def test_a_drift_falls_on_both_sides() -> None:
    assert order(3) == [0, 1, 1, 0, 0, 1]
    places = {side: [place for place, each in enumerate(order(4)) if each == side] for side in (0, 1)}
    assert sum(places[0]) == sum(places[1])


def test_the_ratio_is_of_medians_this_checkout_over_the_other() -> None:
    found = summary([block("old", 1.0, 2.0, 9.0), block("new", 3.0, 1.5, 3.0), block("old", 4.0)])
    assert found["cpu_seconds_median"] == {"old": 3.0, "new": 3.0}
    assert found["cpu_ratio"] == 1.0
    assert found["cpu_ratio_of_least"] == 1.5


def test_every_round_has_its_ratio() -> None:
    blocks = [block(side, seconds, number=n) for n in (0, 1) for side, seconds in (("old", 2.0), ("new", 2.0 + n))]
    assert summary(blocks)["cpu_ratio_by_round"] == {0: 1.0, 1: 1.5}


def test_sides_that_compute_something_else_are_not_compared() -> None:
    compared("default", {"kl": 1.0}, {"kl": 1.00001})
    with pytest.raises(AssertionError, match="kl"):
        compared("default", {"kl": 1.0}, {"kl": 1.001})
    with pytest.raises(AssertionError, match="safe"):
        compared("default", {"kl": 1.0}, {"kl": 1.0, "safe": 1.0})
