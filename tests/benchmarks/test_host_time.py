"""The host's time of a block, ours beside PEFT's: both sides run, and nothing of how they were run stays."""

from __future__ import annotations

import torch

from benchmarks.step import host_time
from benchmarks.step.host_time import measure, missed


def test_both_sides_are_measured_and_nothing_stays(monkeypatch) -> None:
    monkeypatch.setattr(host_time, "BLOCKS", 1)
    found = measure(rounds=1, launch=0.0)
    assert {side: set(parts) for side, parts in found.items()} == {
        "ours": {"reference", "adapted", "backward"},
        "PEFT": {"adapted", "backward"},
        "no adapter": {"adapted", "backward"},
    }
    assert all(seconds > 0 for parts in found.values() for seconds in parts.values())
    assert not torch.zeros(1).is_cuda
    # The kernels' launches are in our time.
    slower = measure(rounds=1, launch=2e-3)
    assert slower["ours"]["adapted"] > found["ours"]["adapted"] + 7 * 2e-3


def test_the_goal_is_a_share_of_peft_s_time() -> None:
    peft = {"adapted": 1.0, "backward": 2.0}
    assert missed({"ours": {"adapted": 0.6, "backward": 1.2}, "PEFT": peft}) == []
    (line,) = missed({"ours": {"adapted": 0.6, "backward": 1.3}, "PEFT": peft})
    assert line.startswith("backward: 0.65 of PEFT's time")
