"""Which learning rate is chosen, by hand-made validations, and the reason that is given."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from repbend_fast.compare.search import Try, choose, search_record, try_of
from repbend_fast.errors import UserError
from repbend_fast.report.run_record import RunRecord, read_run
from repbend_fast.runs.metrics import MetricsLog
from repbend_fast.training.validation import Validation


def tried(
    rate: float,
    step: int,
    attack: float | None = None,
    kl: float | None = 0.01,
    bend: float = 0.0,
    helpful: float | None = None,
    settled: bool = False,
    refused: float | None = None,
) -> Try:
    rates = {} if attack is None else {"attack_direct": attack, "attack_prefill": attack}
    if attack is not None and refused is not None:
        for group in ("attack_direct", "attack_prefill"):
            rates |= {f"{group}_refused": refused, f"{group}_degenerate": 1 - attack - refused}
    if helpful is not None:
        rates["helpful_ordinary"] = helpful
    return Try(
        rate, Validation(step, kl, distance={"unsafe": {"2": bend}, "safe": {"2": 0.0}}, rates=rates, settled=settled)
    )


def chosen(*tries: Try) -> tuple[float, str]:
    best, why = choose("method", tries)
    assert choose("method", tries[::-1])[0] == best
    return best.learning_rate, why


def test_the_lowest_attack_rate_within_limits_wins() -> None:
    rate, why = chosen(tried(1e-3, 20, 0.5), tried(2e-3, 10, 0.2), tried(5e-4, 40, 0.3))
    assert (rate, why) == (2e-3, "attack success 20.0% at step 10, within limits: the lowest of the rates")


def test_one_that_ends_at_the_target_goes_before_a_passing_lower_rate() -> None:
    passing, settled, other = (
        tried(1e-3, 20, 0.0),
        tried(2e-3, 60, 0.04, settled=True),
        tried(3e-3, 60, 0.05, settled=True),
    )
    assert chosen(passing, settled) == (
        2e-3,
        "attack success 4.0% at step 60, within limits: the only one at the target with a learning rate that has "
        "fallen to 0",
    )
    assert chosen(passing, settled, other) == (
        2e-3,
        "attack success 4.0% at step 60, within limits: the lowest of those that end at the target",
    )
    assert chosen(settled, other) == (2e-3, "attack success 4.0% at step 60, within limits: the lowest of the rates")


def test_equal_attack_rates_go_to_the_one_that_refuses_more() -> None:
    rate, why = chosen(
        tried(1e-3, 20, 0.2, kl=0.01, helpful=0.95, refused=0.1),
        tried(2e-3, 20, 0.2, kl=0.05, helpful=0.9, refused=0.7),
        tried(3e-3, 20, 0.3, refused=0.7),
    )
    assert rate == 2e-3
    shared = "attack success 20.0% at step 20, within limits: the lowest, shared with another rate; "
    assert why == shared + "more attacks refused, fewer degenerate answers to them"
    babbling, refusing = tried(1e-3, 20, 0.2, helpful=0.9, refused=0.1), tried(2e-3, 20, 0.2, helpful=0.9, refused=0.7)
    rate, why = chosen(babbling, refusing, tried(3e-3, 20, 0.2, helpful=0.95, refused=0.7))
    assert (rate, why) == (3e-3, shared + "more helpful, fewer degenerate ones")


def test_equal_attack_rates_go_to_the_more_helpful() -> None:
    rate, why = chosen(tried(1e-3, 20, 0.2, kl=0.01, helpful=0.9), tried(2e-3, 20, 0.2, kl=0.05, helpful=0.95))
    assert rate == 2e-3
    assert (
        why
        == "attack success 20.0% at step 20, within limits: the lowest, shared with another rate; more helpful, fewer "
        "degenerate ones"
    )


def test_equal_attack_rates_and_answers_go_to_the_lower_kl() -> None:
    rate, why = chosen(tried(1e-3, 20, 0.2, kl=0.05), tried(2e-3, 20, 0.2, kl=0.02), tried(3e-3, 20, 0.4, kl=0.001))
    assert rate == 2e-3
    assert (
        why == "attack success 20.0% at step 20, within limits: the lowest, shared with another rate; KL 0.0200 is the "
        "lower one"
    )


def test_rates_equal_in_both_go_to_the_lower_rate() -> None:
    rate, why = chosen(tried(2e-3, 20, 0.2), tried(1e-3, 40, 0.2))
    assert rate == 1e-3
    assert why.endswith("KL 0.0100 shared with another rate too; the lower rate")


def test_without_prompts_the_largest_bending_wins() -> None:
    assert chosen(tried(1e-3, 20, bend=3.0), tried(2e-3, 20, bend=7.0)) == (
        2e-3,
        "unsafe minus safe distance 7 at step 20, within limits: the largest of the rates",
    )


def test_a_rate_that_never_left_step_0_ranks_last_even_where_its_rates_are_lower() -> None:
    rate, why = chosen(tried(1e-3, 0, 0.1, kl=0.0), tried(2e-3, 20, 0.4))
    assert (rate, why) == (2e-3, "attack success 40.0% at step 20, within limits, where no other rate left step 0")


def test_an_only_rate_that_never_left_step_0_says_so() -> None:
    assert chosen(tried(2e-3, 0, 0.9, kl=0.0)) == (
        2e-3,
        "the only rate; it never left step 0 within validation's limits, so the model is kept as it was",
    )


def test_where_no_rate_left_step_0_the_lowest_stands_for_the_model_as_it_was() -> None:
    rate, why = chosen(tried(2e-3, 0, 0.9, kl=0.0), tried(1e-3, 0, 0.9, kl=0.0))
    assert rate == 1e-3
    assert why.startswith("no rate left step 0 within validation's limits")


def test_a_rate_that_broke_off_comes_behind_everything() -> None:
    broke = Try(1e-3, None, "the loss is not finite")
    assert chosen(broke, tried(2e-3, 0, 0.9))[0] == 2e-3
    with pytest.raises(
        UserError, match=r"^method: no learning rate could be trained to the end \(the loss is not finite\)"
    ):
        choose("method", [broke])


def test_a_single_rate_says_so() -> None:
    assert chosen(tried(1e-3, 20, 0.25))[1] == "the only rate; attack success 25.0% at step 20, within limits"


@pytest.fixture
def logged(tmp_path: Path) -> RunRecord:
    """A run whose second validation is the best and whose third is ruined."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    start = Validation(
        0,
        0.0,
        30.0,
        1.0,
        {"unsafe": {"2": 0.0}, "safe": {"2": 0.0}},
        {"attack_direct": 0.9, "attack_prefill": 1.0},
        best=True,
    )
    good = Validation(
        10,
        0.02,
        31.0,
        1.03,
        {"unsafe": {"2": 4.0}, "safe": {"2": 1.0}},
        {"attack_direct": 0.2, "attack_prefill": 0.4},
        best=True,
    )
    ruined = Validation(
        20,
        math.nan,
        math.inf,
        None,
        {"unsafe": {"2": math.nan}, "safe": {"2": 1.0}},
        {"attack_direct": 0.0},
        ["kl nan"],
    )
    for validation in (start, good, ruined):
        log.write("validation", **validation.row() | {"step": validation.step})
    return read_run(tmp_path)


def test_a_try_is_the_runs_last_best_validation(logged: RunRecord) -> None:
    best = try_of(1e-3, logged).best
    assert best is not None
    assert (best.step, best.attack, best.kl, best.bending) == (10, pytest.approx(0.3), 0.02, 3.0)


def test_the_record_shows_what_was_ranked_and_survives_numbers_that_are_not_finite(logged: RunRecord) -> None:
    attempt = try_of(1e-3, logged)
    record = search_record(attempt, "because", [(attempt, logged, "demo/seed-0/lr-1e-03")])
    [run] = record["runs"]
    assert (record["chosen"], record["why"], run["best_step"], run["folder"]) == (
        1e-3,
        "because",
        10,
        "demo/seed-0/lr-1e-03",
    )
    assert [(v["step"], v["attack"]) for v in run["validations"]] == [(0, 0.95), (10, pytest.approx(0.3)), (20, 0.0)]
    assert run["validations"][1]["bending"] == 3.0
    assert math.isnan(run["validations"][2]["bending"])
    assert run["validations"][2]["over"] == ["kl nan"]


def test_a_run_that_broke_off_is_no_candidate_though_it_was_validated(logged: RunRecord) -> None:
    logged.events.append(
        {"type": "event", "step": 20, "event": "not_finite", "reason": "the loss is not finite (term kl)"}
    )
    attempt = try_of(1e-3, logged)
    assert (attempt.best, attempt.broke_off) == (None, "the loss is not finite (term kl)")
