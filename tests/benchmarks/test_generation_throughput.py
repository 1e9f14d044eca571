"""The benchmark of batched answers runs, and compares answers that are the same and not all equal."""

from __future__ import annotations

from benchmarks.evaluation.generation_throughput import measure


def test_both_ways_give_the_same_answers() -> None:
    found = measure(3, prompts=5, tokens=4, rounds=1, width=32, blocks=1)
    assert found["same_answers"]
    assert found["different_answers"] > 2
    assert found["speedup"] > 0
    assert found["tokens_per_second"]["batched"] > 0
