"""Every micro-batch of every step draws dropout masks of its own."""

from __future__ import annotations

import hashlib
from itertools import combinations
from typing import Any

import pytest
import torch
from repbend_kernels import low_rank
from test_training_numbers import NO_PROGRESS, make_trainer
from tiny_models import adapted_model, ragged_batch
from tiny_run import TinyRun

from repbend_fast.config.schema import LoraConfig
from repbend_fast.models import lora_dropout, prepared
from repbend_fast.step.dropout_keys import MASKS, dropout_seed, row_keys
from repbend_fast.step.levers import Levers
from repbend_fast.step.pieces import make_piece

STEPS, MICRO_BATCHES = 2, 2


def test_no_two_micro_batches_share_seed_or_masks(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tiny, f"training.accumulation={MICRO_BATCHES}")
    seeds: list[int] = []
    streams: list[str] = []
    drawn: list[set[int]] = []
    run_backward, run_down = trainer.runner.backward, low_rank.low_rank_down

    def watched_backward(stream: Any, scale: float, *, dropout_seed: int) -> Any:
        seeds.append(dropout_seed)
        streams.append(stream.name)
        drawn.append(set())
        return run_backward(stream, scale, dropout_seed=dropout_seed)

    def watched_down(x: Any, a: Any, hashes: Any, place: int, p: float, implementation: str) -> Any:
        drawn[-1].update(hashes.tolist())
        return run_down(x, a, hashes, place, p, implementation)

    # The first step would run a stream again, to look at its distances.
    monkeypatch.setattr("repbend_fast.training.trainer.is_at_start", lambda model: False)
    monkeypatch.setattr(trainer.runner, "backward", watched_backward)
    monkeypatch.setattr(low_rank, "low_rank_down", watched_down)
    for _ in range(STEPS):
        trainer._train_step(NO_PROGRESS)  # type: ignore[arg-type]

    each = len(seeds) // (STEPS * MICRO_BATCHES)
    assert streams == streams[:each] * (STEPS * MICRO_BATCHES)
    assert streams[:each] == ["safe", "unsafe", "retain"]
    by_micro_batch = [seeds[i : i + each] for i in range(0, len(seeds), each)]
    assert all(len(set(found)) == 1 for found in by_micro_batch), "the streams of a micro-batch differ by their names"
    assert len(set(seeds)) == STEPS * MICRO_BATCHES
    # What the layers got: the hashed keys of a stream's rows, one for each of them.
    assert all(len(rows) > 10 for rows in drawn)
    assert all(not a & b for a, b in combinations(drawn, 2))


DRAWN = {2: "fb4b62e17757adc7"}
"""By version of the masks, a digest of those below."""


def test_masks_are_those_of_their_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint says by which version its run drew; a change of any mask needs another one."""
    model, digest = adapted_model(lora=LoraConfig(r=3, alpha=6, dropout=0.25)), hashlib.sha256()
    run_down = low_rank.low_rank_down

    def watched_down(x: Any, a: Any, hashes: Any, place: int, p: float, implementation: str) -> Any:
        width = x.shape[1]
        mask = run_down(torch.ones(len(x), width), [torch.eye(width)], hashes, place, p, implementation) > 0
        assert 0.6 < mask.double().mean() < 0.9
        digest.update(mask.to(torch.uint8).numpy().tobytes())
        return run_down(x, a, hashes, place, p, implementation)

    monkeypatch.setattr(low_rank, "low_rank_down", watched_down)
    sequences = tuple(ragged_batch().unsafe)
    piece = make_piece(sequences, (1, 0), "padded", torch.device("cpu"))
    keys = row_keys(piece, dropout_seed(5, 3, 1), "unsafe")
    with prepared(model, Levers()), lora_dropout(model, keys), torch.no_grad():
        model(input_ids=piece.input_ids)
    assert digest.hexdigest()[:16] == DRAWN[MASKS], "raise MASKS, and note what changed beside it"
