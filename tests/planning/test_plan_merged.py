"""Streams that share their passes as the planner sees them: bytes that a real run takes, and chosen where it saves
time.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from shape_recipes import recipe

from benchmarks.memory.budget_grid import random_model, training_peak
from repbend_fast.planning.batches import worst_batch
from repbend_fast.planning.cards import find_card
from repbend_fast.planning.planner import Planner, show_levers, show_plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MERGED = "memory.merge_streams=on"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    return Planner(recipe(tmp_path_factory.mktemp("merged"), MERGED, layers=6), CPU)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    by_hand = ("memory.offload_embedding=false", "memory.offload_checkpoints=false", "memory.kl_chunk_rows=null")
    folder = tmp_path_factory.mktemp("card")
    return Planner(recipe(folder, "model.dtype=bfloat16", *by_hand, layers=5), CUDA)


def test_the_planned_peak_is_the_measured_one(small: Planner) -> None:
    plan = small.plan(None)
    batch = worst_batch(small.config.training.sizes, small.limits)
    measured = training_peak(random_model(small.config), small.config, plan.levers, batch)
    assert plan.total == pytest.approx(measured["bytes"], rel=0.10)
    assert plan.total > 1.2 * small._checked(replace(plan.levers, merge_streams="off"), None).total
    assert plan.limit == "no budget: one piece per stream unless set by hand; the streams share their passes"
    assert "streams merged" in show_plan(plan)


def test_a_budget_is_kept_by_shared_passes(small: Planner) -> None:
    smallest, free = small.smallest()[0], small.plan(None)
    budget = int(smallest + 0.5 * (free.total - smallest))
    plan = small.plan(budget)
    assert plan.levers.merge_streams == "on"
    assert set(plan.levers.piece_tokens) <= {"*"}
    batch = worst_batch(small.config.training.sizes, small.limits)
    measured = training_peak(random_model(small.config), small.config, plan.levers, batch)
    assert measured["bytes"] <= 1.03 * budget


def test_the_prediction_is_an_upper_bound_near_the_truth(small: Planner) -> None:
    for blocks in (0, small.num_blocks):
        levers = replace(small.base_levers, checkpoint_blocks=blocks)
        measured = small.plan(None) if not blocks else small._checked(levers, None)
        predicted = small._predicted(levers)
        assert 0.97 * measured.total <= predicted <= 1.5 * measured.total, blocks


def test_passes_are_shared_where_that_saves_time_and_fits(card: Planner) -> None:
    """The host's launches decide for a model this small."""
    plan = card.plan(20 * 10**9)
    assert plan.levers.merge_streams == "on"
    assert plan.levers.piece_tokens == {}
    apart = replace(plan.levers, merge_streams="off")
    assert plan.seconds < card._plan(apart, dict(plan.streams), plan.total, None).seconds
    least = card.plan(int(1.0005 * card.smallest()[0]))
    assert least.total < plan.total
    assert least.levers.piece_tokens


def test_padding_can_cost_more_than_sharing_saves() -> None:
    """At published lengths four long conversations stretch every short answer to theirs."""
    from repbend_fast.config import load_config

    planner = Planner(load_config("llama-3-8b-instruct", ["model.device=auto"], overlays="qlora"), CUDA)
    planner.use_card(find_card("h100"))
    for packing, pays in (("off", False), ("on", True)):
        apart = replace(planner.base_levers, packing=packing, merge_streams="off")
        merged = replace(apart, merge_streams="on")
        for streams in planner.expected:
            assert (planner.cost.seconds(streams, merged) < planner.cost.seconds(streams, apart)) is pays


def test_levers_say_that_streams_are_merged(small: Planner) -> None:
    assert "streams merged" in show_levers(small.base_levers)
    assert "merged" not in show_levers(replace(small.base_levers, merge_streams="off"))
