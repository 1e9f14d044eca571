"""Streams that share their passes give the results, masks and gradients of one stream after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from objective_runs import ALL_CONFIGS, BATCH, BLOCKS, OTHERWISE, SEARCHING, STEP, STEPS, precise_model
from tiny_models import WITHOUT_DROPOUT, adapted_model, flat, gradients, objective_config, runner_on
from torch import Tensor

from repbend_fast.objectives import build_objective
from repbend_fast.objectives.registry import SETTINGS
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.step import StreamResult, adapted, reference, runner
from repbend_fast.step.levers import EVERY_STREAM, Levers
from repbend_fast.step.pieces import Cut, batches

DROPOUT = WITHOUT_DROPOUT.model_copy(update={"dropout": 0.3})
CONFIGS: dict[str, MethodConfig] = {
    **ALL_CONFIGS,
    "repbend with refusal": objective_config(refusal=0.6, pair=0.4),
    **SEARCHING,
    **OTHERWISE,
    "repbend by reference": objective_config(distance_unit="reference", unsafe_limit=0.9),
}
UNITS = {layer: 3.0 + layer for layer in range(BLOCKS + 1)}
LEVERS: dict[str, Levers] = {
    "packed": Levers(packing="on"),
    "padded, recomputed": Levers(checkpoint_blocks=BLOCKS),
    "packed, split": Levers({EVERY_STREAM: 40}, 2, packing="on"),
    "padded, by stream": Levers({"safe": 20, "unsafe": 60, "retain": 70, "forget": 33, "triplet": 44}),
    "one by one": Levers({EVERY_STREAM: 1}, packing="on"),
}
Step = tuple[dict[str, StreamResult], Tensor]


def step_of(model: Any, config: MethodConfig, levers: Levers, merged: bool) -> Step:
    model.zero_grad(set_to_none=True)
    objective = build_objective(config, BLOCKS, STEPS)
    levers = replace(levers, merge_streams="on" if merged else "off")
    ours = runner_on(model, levers, uses_head=objective.uses_head)
    ours.units.update(UNITS)
    streams = objective.streams(BATCH, STEP)
    results = ours.backward_all(streams, 0.5, dropout_seed=5)
    return {stream.name: result for stream, result in zip(streams, results, strict=True)}, flat(gradients(model))


def assert_same(found: Step, expected: Step, tolerance: float = 1e-10) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, result in expected[0].items():
        got = found[0][name]
        assert got.tokens == result.tokens
        assert got.terms.keys() == result.terms.keys()
        for term, value in result.terms.items():
            assert_matches(got.terms[term], value, tolerance=tolerance, name=f"{name}: {term}")
        assert got.layers.keys() == result.layers.keys()
        for term, layers in result.layers.items():
            for layer, value in layers.items():
                assert_matches(got.layers[term][layer], value, tolerance=tolerance, name=f"{term} at {layer}")
        assert_matches(got.loss, result.loss, tolerance=1e-6, name=f"loss of {name}")  # a sum in float32
    assert_matches(found[1], expected[1], tolerance=tolerance, name="gradient")


@pytest.fixture(scope="module")
def precise() -> Any:
    return precise_model(lora=DROPOUT)


@pytest.fixture(scope="module")
def apart(precise: Any) -> dict[str, Step]:
    return {name: step_of(precise, config, Levers(), merged=False) for name, config in CONFIGS.items()}


def test_every_method_is_compared() -> None:
    assert {config.name for config in CONFIGS.values()} == set(SETTINGS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("levers", LEVERS.values(), ids=LEVERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_merged_streams_give_the_step_of_separate_ones(name: str, levers: Levers, precise: Any, apart: Any) -> None:
    # A search's first step is the sign of a gradient, which rounding reaches.
    tolerance = 1e-7 if "attacked" in name or name in SEARCHING else 1e-10
    assert_same(step_of(precise, CONFIGS[name], levers, merged=True), apart[name], tolerance)


def test_the_comparison_sees_masks_under_another_stream_s_name(precise: Any, apart: Any, monkeypatch: Any) -> None:
    real = runner.row_keys
    monkeypatch.setattr(runner, "row_keys", lambda piece, seed, stream: real(piece, seed, "safe"))
    found = step_of(precise, CONFIGS["repbend"], Levers(), merged=True)
    assert relative_l2(found[1], apart["repbend"][1]) > 1e-2


def passes_of(monkeypatch: pytest.MonkeyPatch, model: Any, levers: Levers, merged: bool) -> tuple[list[int], list[int]]:
    """Positions of each reference and each adapted pass."""
    found: tuple[list[int], list[int]] = ([], [])
    with monkeypatch.context() as patch:
        for sizes, module in zip(found, (reference, adapted)):
            real = module.run_decoder

            def counted(decoder: Any, ids: Tensor, real: Any = real, sizes: list[int] = sizes, **others: Any) -> None:
                sizes.append(ids.numel())
                real(decoder, ids, **others)

            patch.setattr(module, "run_decoder", counted)
        step_of(model, objective_config(), levers, merged)
    return found


def test_streams_share_one_pass_or_as_many_as_their_sizes_ask_for(precise: Any, monkeypatch: Any) -> None:
    packed = Levers(packing="on")
    one, three = (passes_of(monkeypatch, precise, packed, merged) for merged in (True, False))
    assert [len(sizes) for sizes in one] == [1, 1]
    assert [len(sizes) for sizes in three] == [3, 3]
    assert sum(one[1]) == sum(three[1])
    capped = Levers({EVERY_STREAM: 60}, packing="on")
    few, many = (passes_of(monkeypatch, precise, capped, merged)[1] for merged in (True, False))
    assert max(few) <= 60
    assert len(few) < len(many)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_batches_hold_each_piece_once_one_of_a_stream_and_no_more_than_each_allows(layout: Any) -> None:
    cuts = [
        Cut(0, (0, 1), (9, 7), 20),
        Cut(0, (2,), (3,), 20),
        Cut(1, (0,), (12,), 30),
        Cut(1, (1,), (2,), 30),
        Cut(2, (0, 1), (6, 5), None),
    ]
    assert batches(cuts, layout, merged=False) == [[cut] for cut in cuts]
    found = batches(cuts, layout, merged=True)
    assert sorted((c.stream, c.members) for batch in found for c in batch) == [(c.stream, c.members) for c in cuts]
    assert 1 < len(found) < len(cuts)
    for batch in found:
        lengths = [length for cut in batch for length in cut.lengths]
        positions = sum(lengths) if layout == "packed" else max(lengths) * len(lengths)
        assert len({cut.stream for cut in batch}) == len(batch)
        assert len(batch) == 1 or all(positions <= (cut.limit or 99) for cut in batch)


@pytest.mark.parametrize("levers", LEVERS.values(), ids=LEVERS)
def test_distances_are_exactly_zero_at_the_start(levers: Levers) -> None:
    model = adapted_model(lora=DROPOUT, trained=False)
    results, gradient = step_of(model, objective_config(cosine=0.0), levers, merged=True)
    for name in ("safe", "unsafe"):
        assert {float(value) for value in results[name].layers[name].values()} == {0.0}
    assert abs(float(results["retain"].terms["kl"])) < 1e-5
    assert float(gradient.norm()) < 1e-4


def test_without_memory_streams_are_run_apart_from_then_on(precise: Any, apart: Any, monkeypatch: Any) -> None:
    real, calls = adapted.run_decoder, []

    def broken(*args: Any, **others: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        real(*args, **others)

    monkeypatch.setattr(adapted, "run_decoder", broken)
    precise.zero_grad(set_to_none=True)
    ours = runner_on(precise, Levers(packing="on", merge_streams="on"))
    said: list[str] = []
    ours.on_out_of_memory = lambda line, words: said.append(line)
    streams = build_objective(CONFIGS["repbend"], BLOCKS).streams(BATCH, 0)
    found = ours.backward_all(streams, 0.5, dropout_seed=5)
    results = {stream.name: result for stream, result in zip(streams, found)}
    assert_same((results, flat(gradients(precise))), apart["repbend"])
    assert ours.levers == Levers(packing="on")
    assert said == [
        "out of memory (streams safe and unsafe and retain, 10 sequences of 101 tokens): one stream after the other "
        "from here on"
    ]
    assert len(calls) == 4
