"""The planner: its peaks are those of a real run, budgets are kept, and it runs the trainer's own step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from shape_recipes import LONGEST, recipe

from benchmarks.memory.budget_grid import grid, random_model, training_peak
from repbend_fast.config import Config
from repbend_fast.data.records import BatchSizes
from repbend_fast.errors import UserError
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.npo import NPOConfig
from repbend_fast.objectives.rmu import RMUConfig
from repbend_fast.planning.batches import limits_of, worst_batch
from repbend_fast.planning.peaks import StreamPeak, measure_piece
from repbend_fast.planning.planner import Planner, choose_levers
from repbend_fast.step import StreamRunner
from repbend_fast.step.levers import Levers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


PlannerOf = Callable[..., Planner]


@pytest.fixture(scope="module")
def planner_of(tmp_path_factory: pytest.TempPathFactory) -> PlannerOf:
    """One planner for each list of overrides: it measures a recipe once."""

    @cache
    def planner(*overrides: str) -> Planner:
        return Planner(recipe(tmp_path_factory.mktemp("model"), *overrides), CPU)

    return planner


@pytest.fixture(scope="module")
def small(planner_of: PlannerOf) -> Planner:
    return planner_of()


def test_planned_peak_without_a_budget_is_the_measured_one(small: Planner) -> None:
    plan = small.plan(None)
    batch = worst_batch(small.config.training.sizes, small.limits)
    measured = training_peak(random_model(small.config), small.config, plan.levers, batch)
    assert plan.total == pytest.approx(measured["bytes"], rel=0.10)


def test_retain_examples_are_planned_for(small: Planner) -> None:
    training = small.config.training.model_copy(update={"retain_examples": 5})
    planner = Planner(small.config.model_copy(update={"training": training}), CPU)
    assert [{s.name: len(s.sequences) for s in streams}["retain"] for streams in planner.expected] == [5] * len(
        planner.expected
    )
    assert planner.plan(None).total > small.plan(None).total


def test_further_refusals_are_planned_for(small: Planner) -> None:
    """They lengthen the stream of refusals, and no other."""
    objective = small.config.objective.model_copy(update={"refusal": 1.0})
    found = []
    for wanted in (None, 9):
        training = small.config.training.model_copy(update={"refusal_examples": wanted})
        planner = Planner(small.config.model_copy(update={"training": training, "objective": objective}), CPU)
        found.append({stream.name: len(stream.sequences) for stream in planner.expected[0]})
        batch = worst_batch(training.sizes, planner.limits)
        assert found[-1] == {s.name: len(s.sequences) for s in planner.objective.streams(batch, 0)}
    assert found[1] == found[0] | {"refusal": 9}
    assert found[0]["refusal"] == small.config.training.examples < 9


@pytest.mark.slow
def test_budgets_are_kept(small: Planner) -> None:
    rows = grid(small.config, random_model(small.config), small.limits, (0.6, 0.25, 0.0), steps=2)
    budgets = [row for row in rows if row["budget_bytes"] is not None]
    assert [row["measured_to_budget"] <= 1.03 for row in budgets] == [True] * 3
    # A planner that always chose the smallest levers would keep any budget.
    assert budgets[0]["measured_bytes"] > 1.05 * budgets[-1]["measured_bytes"]
    assert budgets[0]["levers"]["checkpoint_blocks"] < budgets[-1]["levers"]["checkpoint_blocks"]


def test_prediction_is_an_upper_bound_near_the_truth(small: Planner) -> None:
    for peak in small.peaks:
        for blocks in (0, 4, small.num_blocks):
            stream = small._streams(4, LONGEST)[peak.name]
            measured = measure_piece(small.model, stream, Levers(checkpoint_blocks=blocks, packing="on"), CPU, None)
            predicted = peak.peak(sum(map(len, stream.sequences)), blocks)
            assert 0.97 * measured.outside <= predicted.outside <= 1.35 * measured.outside, (peak.name, blocks)


def test_a_budget_below_the_smallest_is_refused_with_the_smallest(small: Planner) -> None:
    size, levers = small.smallest()
    with pytest.raises(UserError, match=r"memory\.budget=.*smallest that can is [\d.]+MB.*checkpoint_blocks") as caught:
        small.plan(size // 2)
    assert "\n" not in str(caught.value)
    # The last block may as well not be recomputed: it is the first that backward goes through.
    assert levers.checkpoint_blocks >= small.num_blocks - 1
    assert small.plan(int(1.02 * size)).total <= 1.02 * size


def test_streams_that_read_pairs_alone_are_planned_beside_those_that_read_none(planner_of: PlannerOf) -> None:
    """With prompts alone the safe stream reads no pair, and the pair term nothing else."""
    planner = planner_of("objective.loss_mode=prompt_last", "objective.pair=1.0", "memory.checkpoint_blocks=0")
    assert {peak.name: peak.total > 0 for peak in planner.peaks} == {"safe": True, "unsafe": True, "retain": True}
    unsafe = planner._streams(2, LONGEST)["unsafe"]
    (pair,) = [term for term in unsafe.terms if term.name == "pair"]
    assert sum(stop - start for start, stop in pair.spans) > 0


def test_a_stream_that_only_compares_sequences_is_planned(planner_of: PlannerOf) -> None:
    planner = planner_of("objective.unsafe=0", "memory.piece_tokens=16")
    assert {peak.name for peak in planner.peaks} == {"safe", "unsafe", "retain"}
    assert planner.plan(None).streams["unsafe"] > 0


@pytest.mark.parametrize("mode", ["prompt_last", "prompt_all"])
def test_prompts_alone_are_planned_at_their_full_length(mode: str, planner_of: PlannerOf) -> None:
    planner = planner_of(f"objective.loss_mode={mode}")
    for worst in planner.worst_streams(Levers()):
        peak = next(p for p in planner.peaks if p.name == worst.name)
        assert max(map(len, worst.sequences)) >= LONGEST // 2
        assert 0.9 * peak.total <= sum(map(len, worst.sequences)) <= 1.1 * peak.total


@pytest.mark.parametrize("size", [None, 8, 2 * LONGEST, 5 * LONGEST])
def test_the_worst_piece_of_a_stream_of_two_roles_is_no_larger_than_asked(
    size: int | None, planner_of: PlannerOf
) -> None:
    planner = planner_of("objective.name=crl", "objective.window_start=5", "objective.window_size=2")
    levers = Levers() if size is None else Levers(piece_tokens={"*": size})
    for worst in planner.worst_streams(levers):
        peak = next(p for p in planner.peaks if p.name == worst.name)
        positions = peak.total if size is None else max(size, peak.longest)
        assert 0.9 * positions <= sum(map(len, worst.sequences)) <= 1.01 * positions


def test_what_a_refusal_advises_would_help(planner_of: PlannerOf) -> None:
    plain = planner_of()
    with pytest.raises(
        UserError,
        match=r"data\.max_answer_tokens, or set model\.quantization=nf4, or set training\.optimizer=adamw_8bit$",
    ):
        plain.plan(10**4)
    small = planner_of("model.quantization=nf4", "training.optimizer=adamw_8bit")
    with pytest.raises(UserError, match=r"or lower data\.max_prompt_tokens or data\.max_answer_tokens$"):
        small.plan(10**4)


def test_offloading_is_not_counted_on_where_the_device_is_the_host(planner_of: PlannerOf) -> None:
    planner = planner_of("memory.offload_embedding=true", "memory.offload_checkpoints=true")
    assert planner.plan(None).total == planner_of().plan(None).total
    assert planner.base_levers == replace(planner.base_levers, offload_embedding=False, offload_checkpoints=False)


def test_reference_passes_are_counted_where_they_run(small: Planner) -> None:
    def reference(config: NPOConfig | RMUConfig) -> int:
        streams = build_objective(config, small.num_blocks, 10).streams(worst_batch(BatchSizes(2), small.limits), 0)
        return small.cost.flops([s for s in streams if s.name == "forget"], Levers())["reference"]

    assert reference(RMUConfig(layer=4)) == 0
    assert reference(NPOConfig()) > 0


def test_levers_set_by_hand_stay(tmp_path: Path) -> None:
    config = recipe(
        tmp_path,
        "memory.checkpoint_blocks=3",
        "memory.piece_tokens=200",
        "memory.kl_chunk_rows=16",
        "memory.packing=off",
    )
    planner = Planner(config, CPU)
    plan = planner.plan(10**9)
    assert plan.levers == Levers({"*": 200}, 3, False, False, 16, "off")


def test_the_step_that_trains_is_the_step_that_is_planned(small: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = StreamRunner.backward

    def counted(self: StreamRunner, stream: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(stream.name)
        return real(self, stream, *args, **kwargs)

    monkeypatch.setattr(StreamRunner, "backward", counted)
    small.plan(None)
    assert set(ran) == {"safe", "unsafe", "retain"}


def test_nf4_counts_half_a_byte_per_weight_and_its_scales(tmp_path: Path) -> None:
    plain = Planner(recipe(tmp_path, "model.dtype=bfloat16"), CUDA)
    packed = Planner(recipe(tmp_path, "model.dtype=bfloat16", "model.quantization=nf4"), CUDA)
    linears = 8 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)
    saved = plain.standing.weights - packed.standing.weights
    # 4 bits, one byte of scale per 64 weights, and a few tables per layer.
    assert saved == pytest.approx(linears * (2 - 0.5 - 1 / 64), rel=0.04)


@pytest.mark.slow
def test_llama_3_8b_in_nf4_fits_below_8_gb() -> None:
    from repbend_fast.config import load_config

    config = load_config("llama-3-8b-instruct", ["model.device=auto"], overlays="qlora")
    plan = Planner(config, CUDA).plan(8 * 10**9)
    assert plan.total <= 8 * 10**9
    assert 5.5e9 < plan.standing.weights < 6e9
    assert plan.notes


def test_choose_levers_without_a_budget_is_the_recipe(tmp_path: Path) -> None:
    config: Config = recipe(tmp_path, "memory.checkpoint_blocks=2")
    assert choose_levers(config, None, CPU) == replace(Levers(), checkpoint_blocks=2, packing="on")


def test_limits_come_from_the_recipe(tmp_path: Path) -> None:
    limits = limits_of(recipe(tmp_path))
    assert (limits.prompt, limits.answer, limits.longest) == (LONGEST, LONGEST, 2 * LONGEST)


REFUSAL = ("objective.refusal=30", "objective.recovery_tokens=16")
ALONE = tuple(f"objective.{term}=0" for term in ("safe", "unsafe", "cosine", "kl"))


def refusal_peak(planner: Planner) -> StreamPeak:
    (peak,) = [p for p in planner.peaks if p.name == "refusal"]
    return peak


@pytest.mark.parametrize("others", [(), ALONE], ids=["with bending", "alone"])
def test_the_refusal_s_stream_is_planned_with_its_longest_starts(
    others: tuple[str, ...], planner_of: PlannerOf
) -> None:
    planner = planner_of(*REFUSAL, *others)
    peak = refusal_peak(planner)
    assert (peak.longest, peak.total) == (2 * LONGEST + 16, 2 * (2 * LONGEST + 16))
    assert peak.head_rows >= 0.5
    # No step draws more than was planned for.
    batch = worst_batch(BatchSizes(2), planner.limits)
    objective = build_objective(planner.config.objective, planner.num_blocks, 10, seed=3)
    drawn = [objective.streams(batch, step)[-1] for step in range(50)]
    assert {s.name for s in drawn} == {"refusal"}
    lengths = [len(s) for stream in drawn for s in stream.sequences]
    assert 2 * LONGEST + 8 < max(lengths) <= peak.longest
    plan = planner.plan(None)
    measured = training_peak(random_model(planner.config), planner.config, plan.levers, batch)
    assert measured["bytes"] <= plan.total <= 1.25 * measured["bytes"]


def test_separators_are_planned_with_as_many_tokens_as_bytes(planner_of: PlannerOf) -> None:
    for separator, most in (("##", 2), ("…", 3)):
        peak = refusal_peak(planner_of(*REFUSAL, *ALONE, f"objective.recovery_separator={separator}"))
        assert peak.longest == 2 * LONGEST + 16 + most


def test_without_starts_the_refusal_s_sequences_are_the_safe_ones(planner_of: PlannerOf) -> None:
    for off in ("objective.recovery_tokens=0", "objective.recovery_share=0"):
        peak = refusal_peak(planner_of("objective.refusal=30", *ALONE, off))
        assert (peak.longest, peak.total) == (2 * LONGEST, 4 * LONGEST)


@pytest.mark.parametrize("size", [None, 8, 2 * LONGEST, 5 * LONGEST])
def test_the_refusal_s_worst_piece_is_no_larger_than_asked(size: int | None, planner_of: PlannerOf) -> None:
    planner = planner_of(*REFUSAL, *ALONE)
    (worst,) = [
        s for s in planner.worst_streams(Levers() if size is None else Levers({"*": size})) if s.name == "refusal"
    ]
    peak = refusal_peak(planner)
    positions = peak.total if size is None else max(size, peak.longest)
    assert 0.9 * positions <= sum(map(len, worst.sequences)) <= 1.01 * positions


def test_units_of_the_reference_and_a_window_by_depth_are_planned(tmp_path: Path) -> None:
    """Units are constants, whatever they are: the same plan, for the window that the depth gives."""
    auto = ("objective.window_start=auto", "objective.window_size=auto", "objective.distance_unit=reference")
    numbers = ("objective.window_start=3", "objective.window_size=1")
    plans = [
        Planner(recipe(tmp_path, *chosen, layers=4), torch.device("cpu")).plan(None, check=False)
        for chosen in (auto, numbers)
    ]
    assert plans[0].total == pytest.approx(plans[1].total, rel=1e-3)
    assert set(plans[0].streams) == set(plans[1].streams)
