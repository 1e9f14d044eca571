"""A search takes little more memory than the step that it is part of, with the levers on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shape_recipes import LONGEST, recipe

from repbend_fast.data.records import BatchSizes
from repbend_fast.objectives import build_objective
from repbend_fast.planning.batches import limits_of, worst_batch
from repbend_fast.planning.peaks import measure_piece
from repbend_fast.planning.shapes import shape_model
from repbend_fast.step.levers import EVERY_STREAM, Levers

BLOCKS = 12
MORE = 1.3


@pytest.mark.slow
def test_a_step_with_a_search_takes_little_more(tmp_path: Path) -> None:
    config = recipe(tmp_path, "objective.refusal=1.0", "objective.adversarial.weight=1", layers=BLOCKS)
    objective = build_objective(config.objective, BLOCKS, 1)
    model = shape_model(config.model, config.lora, (objective.last_state,))
    levers = Levers({EVERY_STREAM: 2 * LONGEST}, checkpoint_blocks=BLOCKS)
    peaks = {
        stream.name: measure_piece(model, stream, levers, torch.device("cpu"), None).total(0)
        for stream in objective.streams(worst_batch(BatchSizes(1), limits_of(config)), 0)
    }
    searching = {name: peak for name, peak in peaks.items() if name.startswith("perturbed_")}
    without = max(peak for name, peak in peaks.items() if name not in searching)
    assert searching.keys() == {"perturbed_unsafe", "perturbed_refusal"}
    assert max(searching.values()) <= MORE * without, peaks
    # The same with everything in one piece and nothing recomputed: the levers reach the search.
    plain = measure_piece(
        model,
        objective.streams(worst_batch(BatchSizes(1), limits_of(config)), 0)[-1],
        Levers(),
        torch.device("cpu"),
        None,
    )
    assert plain.total(0) > 2 * max(searching.values())
