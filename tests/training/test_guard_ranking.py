"""Which of two validations the guard ranks first: attacks, then refusals in place of babble, then
usefulness, then KL.
"""

from __future__ import annotations

import pytest
from hand_made import at, best_of, judged

from repbend_fast.config.schema import ValidationConfig
from repbend_fast.training.guard import Guard
from repbend_fast.training.validation import Validation


def both(refused: float, broken: float) -> dict[str, tuple[float, float]]:
    return {"attack_direct": (refused, broken), "attack_prefill": (refused, broken)}


def test_of_equal_attack_rates_the_one_that_refuses_in_place_of_babbling_is_best() -> None:
    start = at(0, attack=0.9, helpful=1.0, shares=both(0.1, 0.0))
    babbling = at(1, attack=0.0, helpful=1.0, kl=0.001, shares=both(0.0, 1.0))
    refusing = at(2, attack=0.0, helpful=0.95, kl=0.1, shares=both(0.9, 0.1))
    assert best_of(start, babbling, refusing) == 2
    assert best_of(start, refusing, babbling) == 2


def test_attacks_come_before_refusals_and_refusals_before_usefulness_and_kl() -> None:
    start = at(0, attack=0.9, helpful=1.0)
    assert (
        best_of(
            start,
            at(1, attack=0.2, helpful=1.0, shares=both(0.8, 0.0)),
            at(2, attack=0.1, helpful=1.0, shares=both(0.0, 0.9)),
        )
        == 2
    )
    assert (
        best_of(
            start,
            at(1, attack=0.1, helpful=1.0, shares=both(0.5, 0.4)),
            at(2, attack=0.1, helpful=0.96, shares=both(0.6, 0.3)),
        )
        == 2
    )
    assert (
        best_of(
            start,
            at(1, attack=0.1, helpful=1.0, shares=both(0.9, 0.0)),
            at(2, attack=0.1, helpful=1.0, shares=both(0.8, 0.1)),
        )
        == 1
    )
    equal = both(0.7, 0.2)
    assert (
        best_of(
            start, at(1, attack=0.1, helpful=0.96, shares=equal), at(2, attack=0.1, kl=0.1, helpful=1.0, shares=equal)
        )
        == 2
    )
    assert best_of(start, at(1, attack=0.1, kl=0.05, shares=equal), at(2, attack=0.1, kl=0.02, shares=equal)) == 2
    assert best_of(start, at(1, attack=0.1, kl=0.02, shares=equal), at(2, attack=0.1, kl=0.02, shares=equal)) == 1


def test_equal_sums_of_shares_are_equal_whatever_their_rounding() -> None:
    """(0.1 + 0.5) / 2 and (0.2 + 0.4) / 2 differ in the last bit; the more useful answers decide, not that bit."""
    first = {"attack_direct": (0.1, 0.0), "attack_prefill": (0.5, 0.0)}
    second = {"attack_direct": (0.2, 0.0), "attack_prefill": (0.4, 0.0)}
    assert at(1, shares=first).refusal != at(1, shares=second).refusal
    for one, other in ((first, second), (second, first)):
        assert (
            best_of(at(0, attack=0.9), at(1, attack=0.5, kl=0.05, shares=one), at(2, attack=0.5, kl=0.02, shares=other))
            == 2
        )
        assert (
            best_of(at(0, attack=0.9), at(1, attack=0.5, kl=0.02, shares=one), at(2, attack=0.5, kl=0.05, shares=other))
            == 1
        )


def test_refusal_is_the_mean_of_refused_minus_degenerate_over_the_measured_attacks() -> None:
    assert at(1, shares={"attack_direct": (0.9, 0.1), "attack_prefill": (0.5, 0.5)}).refusal == pytest.approx(0.4)
    assert at(1, shares={"attack_prefill": (0.25, 0.5)}).refusal == -0.25
    assert at(1, attack=0.1).refusal == 0.0


def test_a_settled_adapter_goes_before_one_that_refuses_more() -> None:
    guard = judged(ValidationConfig(target_attack=0.1), at(0, attack=0.9), at(1, attack=0.0, shares=both(1.0, 0.0)))
    settled = at(2, attack=0.1, shares=both(0.5, 0.4))
    guard.judge(settled, rate_is_zero=True)
    assert guard.best is settled
    more = at(3, attack=0.1, shares=both(0.6, 0.3))
    guard.judge(more, rate_is_zero=True)
    assert guard.best is more


def test_a_checkpoint_from_before_the_shares_were_kept_goes_on() -> None:
    old = Guard(ValidationConfig())
    state = judged(ValidationConfig(), at(0, attack=0.9, helpful=1.0), at(1, attack=0.0, helpful=1.0)).state_dict()
    assert set(state["best"]["rates"]) == {
        "attack_direct",
        "attack_prefill",
        "helpful_ordinary",
        "helpful_borderline",
        "degenerate_ordinary",
    }
    old.load_state_dict(state)
    babbling, refusing = (
        at(step, attack=0.0, helpful=1.0, shares=shares) for step, shares in ((2, both(0.0, 1.0)), (3, both(0.9, 0.1)))
    )
    old.judge(babbling)
    assert (babbling.best, babbling.over) == (False, [])
    old.judge(refusing)
    assert old.best is refusing


def test_a_row_of_the_log_has_the_shares_and_gives_them_back() -> None:
    validation = at(1, attack=0.0, shares=both(0.75, 0.25))
    row = validation.row() | {"step": 1}
    assert (row["attack_prefill_refused"], row["attack_direct_degenerate"]) == (0.75, 0.25)
    assert Validation.from_row(row) == validation
