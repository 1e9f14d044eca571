"""Every micro-batch of every step draws dropout masks of its own."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from repbend_kernels import low_rank
from test_training_numbers import NO_PROGRESS, make_trainer
from tiny_run import TinyRun

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
