"""Whatever the levers, the gradient is that of the plain one-piece step, LoRA dropout on."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_compare import assert_matches, relative_l2
from tiny_models import (
    BLOCKS,
    WITHOUT_DROPOUT,
    adapted_model,
    flat,
    gradients,
    objective_config,
    ragged_batch,
    runner_on,
)
from torch import Tensor

from repbend_fast.config.schema import MemoryConfig
from repbend_fast.objectives import build_objective
from repbend_fast.step import StreamResult, dropout_seed
from repbend_fast.step.levers import EVERY_STREAM, Levers, default_levers, levers_of

CPU = torch.device("cpu")
DROPOUT = WITHOUT_DROPOUT.model_copy(update={"dropout": 0.3})
CONFIG = objective_config(pair=0.4)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
PIECES: dict[str, dict[str, int]] = {
    "whole": {},
    "one by one": {EVERY_STREAM: 1},
    "thirty": {EVERY_STREAM: 30},
    "by stream": {"safe": 20, "unsafe": 25, "retain": 1},
    "unsafe only": {"unsafe": 12},
}
# Each pair of the three choices occurs.
GRID = [
    (name, blocks, ("on", "off")[(i + j) % 2])
    for i, name in enumerate(PIECES)
    for j, blocks in enumerate((0, 2, BLOCKS))
]
EXTRA = {
    "kl chunk": Levers(kl_chunk_rows=3, packing="on"),
    "kl chunk of one, split": Levers({"retain": 7}, kl_chunk_rows=1),
    "offload without recomputation": Levers({EVERY_STREAM: 30}, offload_checkpoints=True),
    "offload, all recomputed": Levers({EVERY_STREAM: 30}, BLOCKS, offload_checkpoints=True, kl_chunk_rows=2),
}


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, Any]:
    return {dtype: adapted_model(dtype=dtype, lora=DROPOUT) for dtype in TOLERANCE}


def run(model: Any, levers: Levers, seed: int = 5) -> tuple[dict[str, StreamResult], dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    runner = runner_on(model, levers)
    streams = build_objective(CONFIG, BLOCKS).streams(ragged_batch(), 0)
    results = {stream.name: runner.backward(stream, 0.5, dropout_seed=seed) for stream in streams}
    return results, gradients(model)


@pytest.fixture(scope="module")
def plain(models: dict[torch.dtype, Any]) -> dict[torch.dtype, Any]:
    return {dtype: run(model, Levers()) for dtype, model in models.items()}


def assert_same(found: Any, expected: Any, tolerance: float) -> None:
    for name, result in expected[0].items():
        got = found[0][name]
        assert got.tokens == result.tokens
        assert got.terms.keys() == result.terms.keys()
        for term, value in result.terms.items():
            assert value.abs() > 1e-3, term
            assert_matches(got.terms[term], value, tolerance=tolerance, name=term)
        assert_matches(got.loss, result.loss, tolerance=10 * tolerance, name=f"loss of {name}")
        assert got.layers.keys() == result.layers.keys()
        for term, layers in result.layers.items():
            assert got.layers[term].keys() == layers.keys()
            for layer, value in layers.items():
                assert_matches(
                    got.layers[term][layer], value, tolerance=tolerance, name=f"{term}, hidden state {layer}"
                )
    assert_matches(flat(found[1]), flat(expected[1]), tolerance=tolerance, name="gradient")


@pytest.mark.parametrize(("pieces", "blocks", "packing"), GRID, ids=lambda v: str(v))
def test_every_choice_gives_the_plain_gradient(models, plain, pieces, blocks, packing) -> None:
    levers = Levers(PIECES[pieces], blocks, packing=packing)
    assert_same(run(models[torch.float64], levers), plain[torch.float64], TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("levers", EXTRA.values(), ids=EXTRA)
def test_every_other_lever_gives_the_plain_gradient(models, plain, levers, dtype) -> None:
    assert_same(run(models[dtype], levers), plain[dtype], TOLERANCE[dtype])


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("pieces", PIECES)
def test_float32_keeps_its_accuracy(models, plain, pieces, packing) -> None:
    found = run(models[torch.float32], Levers(PIECES[pieces], 2, packing=packing))
    assert_same(found, plain[torch.float32], TOLERANCE[torch.float32])


def test_the_masks_follow_seed_step_and_micro_batch(models, plain) -> None:
    """Dropout is on and matters, and the same seed draws the same masks to the bit."""
    expected = flat(plain[torch.float64][1])
    assert torch.equal(flat(run(models[torch.float64], Levers())[1]), expected)
    assert relative_l2(flat(run(models[torch.float64], Levers(), seed=6)[1]), expected) > 1e-2
    seeds = {dropout_seed(*words) for words in itertools.product((1, 2), (0, 1), (0, 1))}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert dropout_seed(1, 0, 0) == 5806193839267297419


def test_each_sequence_of_a_stream_has_masks_of_its_own(models) -> None:
    """Two equal sequences in one stream are two draws."""
    from repbend_fast.data.records import Batch

    batch = ragged_batch()
    runner = runner_on(models[torch.float64], Levers())
    streams = build_objective(CONFIG, BLOCKS).streams(
        Batch(batch.safe, batch.unsafe, batch.pairs, (batch.retain[0],) * 2), 0
    )
    retain = streams[-1]
    twice, once = runner.backward(retain, dropout_seed=1), runner.backward(retain, dropout_seed=2)
    assert float(twice.terms["kl"]) != float(once.terms["kl"])
    from repbend_fast.step.dropout_keys import row_keys
    from repbend_fast.step.pieces import make_piece

    keys = row_keys(make_piece(retain.sequences, (0, 1), "packed", CPU), 1, "retain")
    assert len(set(keys.tolist())) == len(keys)
    padded = row_keys(make_piece(retain.sequences, (1, 0), "padded", CPU), 1, "retain")
    assert set(padded.tolist()) == set(keys.tolist())
    assert not set(row_keys(make_piece(retain.sequences, (0, 1), "packed", CPU), 1, "safe").tolist()) & set(
        keys.tolist()
    )


def test_levers_from_the_configuration(models) -> None:
    assert levers_of(MemoryConfig(), models[torch.float32]) == Levers(packing="on")
    gpu = torch.device("cuda")
    assert default_levers(MemoryConfig(), 4, gpu, "sdpa") == Levers()
    assert default_levers(MemoryConfig(), 4, gpu, "flash_attention_2").packing == "on"
    assert default_levers(MemoryConfig(merge_streams="on"), 4, CPU, "sdpa").merge_streams == "on"
    assert default_levers(MemoryConfig(packing="off"), 4, CPU, "sdpa").packing == "off"
    memory = MemoryConfig(
        piece_tokens={"safe": 8},
        checkpoint_blocks="all",
        offload_checkpoints=True,
        offload_embedding=True,
        kl_chunk_rows=9,
    )
    levers = default_levers(memory, 4, gpu, "sdpa")
    assert levers == Levers({"safe": 8}, 4, True, True, 9, "off")
    assert (levers.piece_size("safe"), levers.piece_size("unsafe")) == (8, None)
    every = default_levers(MemoryConfig(piece_tokens=64, checkpoint_blocks=9), 4, gpu, "sdpa")
    assert (every.piece_size("safe"), every.piece_size("mine"), every.checkpoint_blocks) == (64, 64, 4)
    assert Levers(**levers.as_dict()) == levers


@pytest.mark.parametrize(("memory", "merged"), [(24, "off"), (80, "on")])
def test_streams_share_passes_on_large_cards(memory: int, merged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(total_memory=memory * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    gpu = torch.device("cuda")
    assert default_levers(MemoryConfig(packing="on"), 4, gpu, "sdpa").merge_streams == merged
    assert default_levers(MemoryConfig(packing="on", merge_streams="off"), 4, gpu, "sdpa").merge_streams == "off"
    assert default_levers(MemoryConfig(packing="off"), 4, gpu, "sdpa").merge_streams == "off"
    assert default_levers(MemoryConfig(packing="on"), 4, CPU, "sdpa").merge_streams == "off"
