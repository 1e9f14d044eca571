"""Intervals, the paired test and kappa against values from the literature and from exact arithmetic."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from repbend_fast.evaluation.judges.agreement import kappa
from repbend_fast.evaluation.statistics import mcnemar, wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_newcombe_s_third_method(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(count - successes, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_at_the_ends_is_exact_and_of_nothing_is_everything() -> None:
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (0, 6), (5, 5), (2, 9), (121, 59), (0, 2000)])
def test_mcnemar_counts_all_coins_that_are_as_far_from_the_middle(first: int, second: int) -> None:
    n = first + second
    row = [1]
    for k in range(n):
        row.append(row[-1] * (n - k) // (k + 1))
    extreme = sum(count for k, count in enumerate(row) if abs(2 * k - n) >= abs(first - second))
    assert mcnemar(first, second) == pytest.approx(float(Fraction(extreme, 2**n)), rel=1e-12)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_of_six_that_all_differ_one_way() -> None:
    assert mcnemar(0, 6) == 2 / 2**6


def test_kappa_of_cohen_s_textbook_table() -> None:
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed .7, expected .5."""
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    first, second = map(list, zip(*pairs))
    assert kappa(first, second) == pytest.approx(0.4)
    assert kappa(second, first) == pytest.approx(0.4)


def test_kappa_is_one_for_equal_labels_and_zero_for_independent_ones() -> None:
    pairs = list(itertools.product("abc", "abc"))
    first, second = map(list, zip(*pairs))
    assert kappa(first, first) == pytest.approx(1.0)
    assert kappa(first, second) == pytest.approx(0.0)


def test_kappa_is_undefined_without_answers_and_with_one_label() -> None:
    assert kappa([], []) is None
    assert kappa(["a", "a"], ["a", "a"]) is None
