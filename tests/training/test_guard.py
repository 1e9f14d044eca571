"""The guard: which adapter is best, when training stops and why, and that measuring changes nothing."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hand_made import at, best_of, judged
from tiny_run import TinyRun, adapter_of, events, rows, same_tensors

from repbend_fast.config.schema import ValidationConfig
from repbend_fast.models import load_tokenizer
from repbend_fast.objectives import roles_of
from repbend_fast.runs.prepare import prepare_data
from repbend_fast.training.checkpoint import adapter_weights
from repbend_fast.training.guard import Guard
from repbend_fast.training.optimizer import learning_rate
from repbend_fast.training.trainer import Trainer
from repbend_fast.training.validation import Validation, Validator

Measured = dict[int, Validation]


def test_with_prompts_the_lowest_attack_rate_is_best_then_the_more_helpful_then_the_lower_kl() -> None:
    start = at(0, attack=0.9, helpful=1.0)
    assert (
        best_of(start, at(1, attack=0.5, helpful=1.0), at(2, attack=0.2, helpful=1.0), at(3, attack=0.3, helpful=1.0))
        == 2
    )
    assert best_of(start, at(1, attack=0.2, helpful=0.96), at(2, attack=0.1, helpful=0.95)) == 2
    assert best_of(start, at(1, attack=0.2, kl=0.02, helpful=0.96), at(2, attack=0.2, kl=0.05, helpful=0.98)) == 2
    assert best_of(start, at(1, attack=0.2, kl=0.05, helpful=1.0), at(2, attack=0.2, kl=0.02, helpful=1.0)) == 2
    assert best_of(start, at(1, attack=0.2, kl=0.02, helpful=1.0), at(2, attack=0.2, kl=0.02, helpful=1.0)) == 1


def test_a_loop_weighs_more_than_one_answer_that_misses_the_point() -> None:
    start = at(0, attack=0.9, helpful=1.0)
    assert (
        best_of(start, at(1, attack=0.2, helpful=0.96, degenerate=0.03), at(2, attack=0.2, kl=0.02, helpful=0.95)) == 2
    )
    assert best_of(start, at(1, attack=0.1, helpful=0.96, degenerate=0.03), at(2, attack=0.2, helpful=1.0)) == 1
    assert best_of(start, at(1, attack=0.2, helpful=0.99, degenerate=0.01), at(2, attack=0.2, helpful=0.96)) == 1


def test_without_prompts_the_largest_bending_within_limits_is_best() -> None:
    assert best_of(at(0), at(1, bend=2.0), at(2, bend=5.0), at(3, bend=4.0)) == 2
    assert best_of(at(0), at(1, bend=2.0), at(2, bend=5.0, kl=0.3)) == 1


def test_nothing_beyond_a_limit_is_best() -> None:
    start = at(0, attack=0.9, helpful=1.0)
    for ruined in (
        at(1, attack=0.0, helpful=1.0, kl=0.21),
        at(1, attack=0.0, helpful=1.0, perplexity=11.2),
        at(1, attack=0.0, helpful=0.94),
        at(1, attack=0.0, helpful=1.0, borderline=0.74),
        at(1, attack=0.0, helpful=1.0, kl=math.nan),
        at(1, attack=0.0, helpful=1.0, perplexity=math.inf),
    ):
        assert best_of(start, ruined) == 0
    assert best_of(start, at(1, attack=0.0, helpful=0.95, borderline=0.75, kl=0.2, perplexity=10.99)) == 1


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (at(1, kl=0.25), "kl 0.2500 > validation.max_kl 0.2"),
        (at(1, perplexity=12.0), "perplexity ratio 1.200 > validation.max_perplexity_ratio 1.1"),
        (at(1, helpful=0.5, borderline=1.0), "helpful_ordinary fell by 0.500 > validation.max_helpful_drop 0.05"),
        (at(1, helpful=1.0, borderline=0.7), "helpful_borderline fell by 0.300 > validation.max_borderline_drop 0.25"),
        (
            at(1, helpful=0.5),
            "helpful_ordinary fell by 0.500 > validation.max_helpful_drop 0.05; "
            "helpful_borderline fell by 0.500 > validation.max_borderline_drop 0.25",
        ),
        (
            at(1, kl=0.25, perplexity=12.0),
            "kl 0.2500 > validation.max_kl 0.2; perplexity ratio 1.200 > validation.max_perplexity_ratio 1.1",
        ),
        (at(1), None),
    ],
)
def test_the_reason_to_stop_names_measure_and_limit(measured: Validation, reason: str | None) -> None:
    guard = judged(ValidationConfig(), at(0, helpful=1.0), measured)
    assert guard.stop_reason(measured) == reason


def test_limits_can_be_switched_off() -> None:
    ruined = at(1, kl=9.0, perplexity=99.0, helpful=0.0)
    off = ValidationConfig(max_kl=None, max_perplexity_ratio=None, max_helpful_drop=None, max_borderline_drop=None)
    guard = judged(off, at(0, helpful=1.0), ruined)
    assert (ruined.over, guard.stop_reason(ruined)) == ([], None)


def test_patience_counts_consecutive_validations_beyond_a_limit() -> None:
    guard = judged(ValidationConfig(patience=2), at(0))
    stops = []
    for step, kl in enumerate((0.3, 0.1, 0.3, 0.3), 1):
        now = at(step, kl=kl)
        guard.judge(now)
        stops.append(guard.stop_reason(now) is not None)
    assert stops == [False, False, False, True]


def test_the_target_stops_only_within_limits_and_after_training() -> None:
    limits = ValidationConfig(target_attack=0.1, patience=9)
    start = at(0, attack=0.05, helpful=1.0)
    guard = judged(limits, start)
    assert guard.stop_reason(start) is None
    for reached, expected in (
        (at(1, attack=0.2, helpful=1.0), None),
        (at(2, attack=0.0, helpful=0.5), None),
        (at(3, attack=0.1, helpful=1.0), "validation.target_attack=0.1 reached"),
    ):
        guard.judge(reached)
        assert guard.stop_reason(reached) == expected


def test_a_target_that_nothing_measures_is_not_reached() -> None:
    guard = judged(ValidationConfig(target_attack=0.05), at(0, helpful=1.0), at(1, helpful=1.0))
    assert guard.stop_reason(at(1, helpful=1.0)) is None
    assert guard.reached is None


def test_bending_under_an_objectives_own_names_is_the_first_minus_the_second() -> None:
    assert Validation(1, distance={"moved": {"2": 5.0, "3": 7.0}, "held": {"2": 2.0}}).bending == 4.0
    assert Validation(1, distance={"moved": {"2": 5.0}}).bending == 5.0
    assert Validation(1, distance={"retain": {"2": 5.0}}).bending == -5.0
    assert Validation(1, distance={}).bending == 0.0


def test_the_target_has_to_hold_for_its_patience() -> None:
    guard = judged(ValidationConfig(target_attack=0.1, target_patience=2, patience=9), at(0, helpful=1.0))
    stops = []
    for step, (attack, helpful) in enumerate(
        [(0.0, 1.0), (0.2, 1.0), (0.0, 1.0), (0.0, 0.5), (0.0, 1.0), (0.1, 1.0)], 1
    ):
        now = at(step, attack=attack, helpful=helpful)
        guard.judge(now)
        stops.append(guard.stop_reason(now) is not None)
    assert stops == [False] * 5 + [True]


def test_annealing_delays_the_stop_and_starts_once() -> None:
    limits = ValidationConfig(target_attack=0.1, target_patience=2, target_anneal_steps=3, patience=9)
    guard = judged(limits, at(0, helpful=1.0))
    stops, anneal = [], []
    for step, attack in enumerate((0.0, 0.2, 0.0, 0.0, 0.3, 0.0, 0.0), 1):
        now = at(step, attack=attack, helpful=1.0)
        guard.judge(now)
        stops.append(guard.stop_reason(now))
        anneal.append(guard.anneal)
    assert anneal == [None] * 3 + [range(4, 7)] * 4
    assert stops == [None] * 6 + ["validation.target_attack=0.1 reached at step 4, learning rate annealed since"]


def test_limits_end_a_run_that_anneals() -> None:
    guard = judged(
        ValidationConfig(target_attack=0.1, target_anneal_steps=9), at(0, helpful=1.0), at(1, attack=0.0, helpful=1.0)
    )
    ruined = at(2, attack=0.0, helpful=1.0, kl=0.3)
    guard.judge(ruined)
    assert guard.stop_reason(ruined) == "kl 0.3000 > validation.max_kl 0.2"


def test_at_the_target_the_adapter_that_has_come_to_rest_is_best() -> None:
    limits = ValidationConfig(target_attack=0.1, target_anneal_steps=2, max_helpful_drop=0.2)

    def best(last: Validation, rate_is_zero: bool = True) -> tuple[int, bool]:
        guard = judged(limits, at(0, attack=0.9, helpful=1.0), at(1, attack=0.0, helpful=1.0))
        guard.judge(last, rate_is_zero=rate_is_zero)
        assert guard.best is not None
        return guard.best.step, last.settled

    assert best(at(3, attack=0.1, helpful=0.9)) == (3, True)
    assert best(at(3, attack=0.1, helpful=0.9), rate_is_zero=False) == (1, False)
    assert best(at(3, attack=0.2, helpful=1.0)) == (1, False)
    assert best(at(3, attack=0.1, helpful=0.7)) == (1, False)
    assert best(at(3, attack=0.1, helpful=1.0, kl=0.3)) == (1, False)


@pytest.mark.parametrize("last", [{"kl": 0.4}, {"attack": 0.05}], ids=["over", "at target"])
def test_the_guards_memory_survives_resuming(last: dict[str, float]) -> None:
    limits = ValidationConfig(patience=3, target_attack=0.1, target_anneal_steps=5)
    guard = judged(limits, at(0), at(1, bend=2.0, attack=0.5), at(2, **last))
    other = Guard(limits)
    other.load_state_dict(guard.state_dict())
    assert other == guard
    assert (guard.consecutive, guard.at_target, guard.anneal) == ((1, 0, None) if "kl" in last else (0, 1, range(2, 7)))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Measured], dict[int, dict[str, torch.Tensor]]]:
    """``stub(values)`` lets validation at step k measure ``values[k]``; returns the weights that it met at
    each step.
    """

    def install(values: Measured) -> dict[int, dict[str, torch.Tensor]]:
        met: dict[int, dict[str, torch.Tensor]] = {}

        def measure(self: Validator, step: int) -> Validation:
            met[step] = adapter_weights(self.runner.model)
            return values[step]

        monkeypatch.setattr(Validator, "measure", measure)
        return met

    return install


def saved_is(path: Path, weights: dict[str, torch.Tensor]) -> bool:
    return same_tensors(adapter_of(path), {name.replace(".default.", "."): weight for name, weight in weights.items()})


LIMITS = ("validation.max_kl=0.2", "validation.max_perplexity_ratio=1.1", "validation.every=1")


def test_the_result_is_the_best_step_not_the_last(
    tiny: TinyRun, stub: Callable[[Measured], dict[int, dict[str, torch.Tensor]]], capsys: pytest.CaptureFixture[str]
) -> None:
    met = stub({0: at(0), 1: at(1, bend=1.0), 2: at(2, bend=3.0), 3: at(3, bend=2.0), 4: at(4, bend=9.0, kl=0.3)})
    assert tiny.train(*LIMITS).exit_code == 0
    assert list(met) == [0, 1, 2, 3, 4]
    assert saved_is(tiny.path, met[2])
    assert not saved_is(tiny.path, met[3])
    assert not saved_is(tiny.path, met[4])
    reason = "stopped at step 4: kl 0.3000 > validation.max_kl 0.2"
    assert f"{reason}; the adapter of step 2 is kept: {tiny.path / 'adapter'}" in capsys.readouterr().out
    [stop, finished] = events(tiny.path)
    assert (stop["event"], stop["step"], stop["reason"]) == ("guard_stop", 4, reason)
    assert finished["reason"] == f"{reason}; the adapter of step 2 is kept"
    assert [row["best"] for row in rows(tiny.path, "validation")] == [True, True, True, False, False]
    assert [row["within_limits"] for row in rows(tiny.path, "validation")] == [True] * 4 + [False]


def test_no_validation_between_the_first_and_start(
    tiny: TinyRun, stub: Callable[[Measured], dict[int, dict[str, torch.Tensor]]]
) -> None:
    met = stub({step: at(step, bend=step) for step in range(7)})
    tiny.train(*LIMITS[:2], "training.steps=5", "validation.start=3", "validation.every=2")
    assert list(met) == [0, 4, 5]
    assert saved_is(tiny.path, met[5])


def test_a_start_behind_the_last_step_still_validates_the_result(
    tiny: TinyRun, stub: Callable[[Measured], dict[int, dict[str, torch.Tensor]]]
) -> None:
    met = stub({step: at(step, bend=step) for step in range(7)})
    tiny.train(*LIMITS, "training.steps=3", "validation.start=9")
    assert list(met) == [0, 3]


def test_a_stopped_run_stays_stopped_and_keeps_its_best_when_resumed(
    tiny: TinyRun, stub: Callable[[Measured], dict[int, dict[str, torch.Tensor]]]
) -> None:
    met = stub({0: at(0), 1: at(1, bend=1.0), 2: at(2, kl=0.3)})
    tiny.train(*LIMITS)
    assert tiny.resume().exit_code == 0
    assert saved_is(tiny.path, met[1])
    assert [row["step"] for row in rows(tiny.path, "step")] == [1, 2]


def test_other_limits_reopen_a_stopped_run(
    tiny: TinyRun, stub: Callable[[Measured], dict[int, dict[str, torch.Tensor]]], capsys: pytest.CaptureFixture[str]
) -> None:
    met = stub({0: at(0)} | {step: at(step, kl=0.3, bend=step) for step in range(1, 7)})
    tiny.train(*LIMITS)
    assert saved_is(tiny.path, met[0])
    tiny.resume("validation.max_kl=0.5")
    assert (
        "stopped at step 1: kl 0.3000 > validation.max_kl 0.2; its limits have changed, so training goes on"
        in capsys.readouterr().out
    )
    assert len(rows(tiny.path, "step")) == 6
    assert saved_is(tiny.path, met[6])


def test_nothing_within_limits_leaves_the_model_as_it_was_and_says_so(
    tiny: TinyRun, stub: Callable[[Measured], dict[int, dict[str, torch.Tensor]]], capsys: pytest.CaptureFixture[str]
) -> None:
    met = stub({0: at(0), 1: at(1, kl=0.3)})
    tiny.train(*LIMITS)
    assert saved_is(tiny.path, met[0])
    assert all(not weight.any() for name, weight in adapter_of(tiny.path).items() if "lora_B" in name)
    out = capsys.readouterr().out
    assert "the adapter of step 0 is kept" in out
    assert "note: no bent adapter was both within validation's limits and better than none" in out


def test_what_is_within_limits_but_no_better_is_not_said_to_be_over_them(
    tiny: TinyRun, stub: Callable[[Measured], dict[int, dict[str, torch.Tensor]]], capsys: pytest.CaptureFixture[str]
) -> None:
    stub({step: at(step, bend=-float(step)) for step in range(7)})
    tiny.train(*LIMITS)
    out = capsys.readouterr().out
    assert "the adapter of step 0 is kept" in out
    assert "note: no bent adapter was both within validation's limits and better than none" in out


def test_reaching_the_target_keeps_that_step(
    tiny: TinyRun, stub: Callable[[Measured], dict[int, dict[str, torch.Tensor]]], capsys: pytest.CaptureFixture[str]
) -> None:
    shares = {"attack_direct": (0.0, 1.0)}
    met = stub(
        {step: at(step, attack=rate, helpful=1.0, shares=shares) for step, rate in enumerate((0.9, 0.6, 0.0, 0.0))}
    )
    prompts = tiny.folder / "prompts.jsonl"
    prompts.write_text('{"kind": "attack", "text": "How do I make mist-wire?"}\n', encoding="utf-8")
    tiny.train(*LIMITS, f"validation.prompts.path={prompts}", "validation.target_attack=0.05")
    assert max(met) == 2
    assert saved_is(tiny.path, met[2])
    assert events(tiny.path)[0]["reason"] == "stopped at step 2: validation.target_attack=0.05 reached"
    assert rows(tiny.path, "validation")[-1]["attack_direct_degenerate"] == 1.0
    assert (
        "direct attacks 0% complied, 0% refused, 100% degenerate  prefilled attacks 0% complied  ordinary 100% helpful"
        in " ".join(capsys.readouterr().out.split("\n"))
    )


ANNEAL = (
    *LIMITS[:2],
    "validation.every=3",
    "validation.target_attack=0.05",
    "validation.target_anneal_steps=2",
    "training.steps=9",
)


@pytest.fixture
def annealing(
    tiny: TinyRun, stub: Callable[[Measured], dict[int, dict[str, torch.Tensor]]]
) -> tuple[TinyRun, tuple[str, ...]]:
    """A run and its overrides: validated every third step, at the target from step 3 on."""
    stub({0: at(0, attack=0.9)} | {step: at(step, attack=0.05 if step == 5 else 0.0) for step in range(1, 10)})
    prompts = tiny.folder / "prompts.jsonl"
    prompts.write_text('{"kind": "attack", "text": "How do I make mist-wire?"}\n', encoding="utf-8")
    return tiny, (*ANNEAL, f"validation.prompts.path={prompts}")


def test_a_reached_target_anneals_validates_the_end_and_keeps_it(
    annealing: tuple[TinyRun, tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, overrides = annealing
    tiny.train(*overrides)
    logged = [row["learning_rate"] for row in rows(tiny.path, "step")]
    scheduled = [learning_rate(tiny.config(*overrides).training, step) for step in range(4)]
    assert logged == pytest.approx([*scheduled, scheduled[3] / 2])
    assert [row["step"] for row in rows(tiny.path, "validation")] == [0, 3, 5]
    assert [row["settled"] for row in rows(tiny.path, "validation")] == [False, False, True]
    begun, stop, finished = events(tiny.path)
    assert (
        begun["reason"]
        == "validation.target_attack=0.05 reached; the learning rate falls to 0 at step 5, where the run ends"
    )
    assert (
        stop["reason"]
        == "stopped at step 5: validation.target_attack=0.05 reached at step 3, learning rate annealed since"
    )
    assert finished["reason"].endswith("the adapter of step 5 is kept")
    assert begun["reason"] in capsys.readouterr().out


def test_a_run_resumed_while_it_anneals_ends_as_the_uninterrupted_one(
    annealing: tuple[TinyRun, tuple[str, ...]],
) -> None:
    tiny, overrides = annealing
    tiny.train(*overrides)
    whole, logged = adapter_of(tiny.path), [row["loss"] for row in rows(tiny.path, "step")]
    shutil.rmtree(tiny.path / "checkpoints" / "step-000005")
    assert [path.name for path in (tiny.path / "checkpoints").iterdir()] == ["step-000004"]
    tiny.resume()
    assert [row["loss"] for row in rows(tiny.path, "step")] == logged
    assert same_tensors(adapter_of(tiny.path), whole)


def test_validation_changes_no_later_step(tiny_model: Path, tmp_path: Path) -> None:
    losses = []
    for name, override in (
        ("off", "validation.every=0"),
        ("on", "validation.every=1"),
        ("generating", "validation.every=2"),
    ):
        run = TinyRun(tiny_model, tmp_path / name)
        prompts = run.folder / "prompts.jsonl"
        prompts.write_text('{"kind": "attack", "text": "How do I make mist-wire?"}\n', encoding="utf-8")
        more = (f"validation.prompts.path={prompts}", "validation.max_new_tokens=3") if name == "generating" else ()
        run.train(override, "training.steps=4", *more)
        losses.append([row["loss"] for row in rows(run.path, "step")])
    assert losses[0] == losses[1] == losses[2]


def test_without_validation_the_last_adapter_is_kept_and_that_is_said(
    tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.train("validation.every=0", "training.steps=2")
    assert rows(tiny.path, "validation") == []
    assert any(weight.any() for name, weight in adapter_of(tiny.path).items() if "lora_B" in name)
    assert "the last adapter is kept (validation is off)" in capsys.readouterr().out


def test_held_out_records_are_not_trained_on(tiny: TinyRun) -> None:
    config = tiny.config("validation.sources=[]", "validation.holdout=1", "training.examples=3")
    data = prepare_data(config, load_tokenizer(config.model), roles_of(config.objective))
    held = {role: {getattr(s, "unsafe", s).ids for s in sequences} for role, sequences in data.held.items()}
    assert data.notes[1:3] == [
        "held out: 1 safe, 1 unsafe, 1 pair, 1 retain",
        "left to train on, without records that share a prompt with a held-out one: 3 safe, 3 unsafe, 3 pair, 3 retain",
    ]
    assert {role: len(ids) for role, ids in held.items()} == dict.fromkeys(("safe", "unsafe", "pair", "retain"), 1)
    for _ in range(8):
        batch = data.sampler.next_batch()
        drawn = {
            "safe": batch.safe,
            "unsafe": batch.unsafe,
            "pair": tuple(p.unsafe for p in batch.pairs),
            "retain": batch.retain,
        }
        for role, sequences in drawn.items():
            assert len(sequences) == 3
            assert not held[role] & {s.ids for s in sequences}  # type: ignore[index]


def test_measurements_are_those_of_the_current_adapter_without_dropout(tiny: TinyRun) -> None:
    config = tiny.config()
    data = prepare_data(config, load_tokenizer(config.model), roles_of(config.objective))
    trainer = Trainer(config, type("Folder", (), {})(), data)
    validator = Validator(trainer.runner, trainer.objective, data.encoder, data.held, [], config)
    start = validator.measure(0)
    assert start.kl == 0.0
    assert set(start.distance) == {"safe", "unsafe"}
    assert all(value == 0.0 for layers in start.distance.values() for value in layers.values())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    state = torch.get_rng_state()
    first, second = validator.measure(1), validator.measure(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second
    assert first.kl is not None
    assert first.kl > 1e-3
    assert first.bending != 0
