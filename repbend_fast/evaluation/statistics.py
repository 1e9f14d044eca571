"""Intervals of rates, and a paired test."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054


def wilson(successes: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927), 95 % by default; (0, 1) where nothing was counted.

    ``successes`` may be a stored rate times ``count``, and so no whole number.
    """
    if count == 0:
        return 0.0, 1.0
    rate, spread = successes / count, z * z / count
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / count + spread / (4 * count))
    # At 0 and at 1 the bound is exact; the sums leave a rounding error there.
    return min(rate, max(0.0, middle - half)), max(rate, min(1.0, middle + half))


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
