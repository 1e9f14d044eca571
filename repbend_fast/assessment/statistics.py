"""Intervals of rates, a paired test, and the agreement of two judges."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054


def wilson(successes: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927), 95 % by default; (0, 1) where nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    rate, spread = successes / count, z * z / count
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / count + spread / (4 * count))
    # At 0 and at 1 the bound is exact; the sums leave a rounding error there.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == count else middle + half)


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided p-value of McNemar's test: both sides of a coin are as likely for the pairs that differ.

    1 where no pair differs.
    """
    differing = first_only + second_only
    if differing == 0:
        return 1.0
    rarer = min(first_only, second_only)
    tail = sum(math.comb(differing, k) for k in range(rarer + 1))
    return min(1.0, 2 * tail / 2**differing)


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Cohen's kappa of two judges' labels of the same answers: agreement beyond chance, 1 at most.

    None where it is not defined: no answers, or both give all of them one and the same label.
    """
    pairs = list(zip(first, second, strict=True))
    if not pairs:
        return None
    labels = set(first) | set(second)
    observed = sum(a == b for a, b in pairs) / len(pairs)
    expected = sum(first.count(label) * second.count(label) for label in labels) / len(pairs) ** 2
    return None if expected == 1 else (observed - expected) / (1 - expected)
