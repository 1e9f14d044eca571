"""The tracker counts what the allocator counts, for real and for fake tensors."""

from __future__ import annotations

import pytest
import torch
from tiny_models import objective_config, ragged_batch, runner_on, tiny_model, wrap
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measure import peak_bytes
from repbend_fast.models import find_decoder
from repbend_fast.objectives import build_objective
from repbend_fast.planning.scratch import op_scratch
from repbend_fast.planning.tracker import MemoryTracker, module_tensors, tensor_bytes
from repbend_fast.step.levers import Levers

CPU = torch.device("cpu")
MIB = 1 << 20


def test_peak_and_live_follow_what_is_made_and_freed() -> None:
    with MemoryTracker() as tracker:
        kept = torch.zeros(MIB, dtype=torch.uint8)
        passing = torch.zeros(3 * MIB, dtype=torch.uint8)
        view = passing[5:]
        del passing
        assert tracker.live == 4 * MIB  # the view holds the storage
        del view
        other = torch.zeros(2 * MIB, dtype=torch.uint8)
    assert tracker.live == 3 * MIB
    assert tracker.peak == 4 * MIB
    assert tracker.peak_categories["activations"] == 4 * MIB
    del kept, other
    assert tracker.live == 0


def test_watched_tensors_keep_their_category() -> None:
    weight = torch.zeros(MIB, dtype=torch.uint8)
    tracker = MemoryTracker()
    tracker.watch([weight], "weights")
    with tracker:
        made = weight + 1
    assert tracker.peak_categories == {"weights": MIB, "activations": MIB, "scratch": 0}
    tracker.watch([made], "gradients")
    assert tracker.live == 2 * MIB  # counted once, whatever it is called
    del made
    assert tracker.live == MIB


def test_scratch_counts_unless_a_lever_decides_it() -> None:
    x = torch.zeros(MIB, dtype=torch.uint8)
    for apart, peak, at_op in ((frozenset(), 6 * MIB, None), (frozenset({"aten::neg"}), MIB, MIB)):
        with MemoryTracker(
            {"aten::neg": lambda args: 5 * args[0].numel()} if not apart else {}, apart=apart
        ) as tracker:
            x.neg()
        assert (tracker.peak, tracker.at_op) == (peak, at_op)


def test_fake_tensors_count_as_real_ones() -> None:
    def work(x: torch.Tensor) -> None:
        (torch.nn.functional.silu(x @ x) * x).sum().backward()

    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = torch.empty(300, 300, requires_grad=True)
    peaks = []
    for x in (torch.randn(300, 300, requires_grad=True), twin):
        tracker = MemoryTracker()
        tracker.watch([x], "input")
        with tracker:
            work(x)
        peaks.append(tracker.peak)
    assert peaks[0] == peaks[1] > 3 * 300 * 300 * 4


@pytest.mark.parametrize("checkpoint_blocks", [0, 4])
def test_a_step_peaks_where_the_allocator_says(checkpoint_blocks: int) -> None:
    model = wrap(tiny_model())
    objective = build_objective(objective_config(), find_decoder(model).num_blocks)
    stream = objective.streams(ragged_batch(), 0)[0]
    runner = runner_on(model, Levers(checkpoint_blocks=checkpoint_blocks, packing="on"))
    runner.backward(stream, dropout_seed=0)
    model.zero_grad(set_to_none=True)
    recorded = peak_bytes(lambda: runner.backward(stream, dropout_seed=0), CPU)
    model.zero_grad(set_to_none=True)
    tracker = MemoryTracker(op_scratch(CPU))
    tracker.watch(module_tensors(model), "weights")
    with tracker:
        runner.backward(stream, dropout_seed=0)
    assert tracker.peak - tensor_bytes(module_tensors(model)) == pytest.approx(recorded, rel=0.03)
