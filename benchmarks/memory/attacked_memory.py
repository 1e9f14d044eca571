"""What latent adversarial training adds to the memory of a step, planned on fake tensors: nothing is measured.

    python -m benchmarks.memory.attacked_memory        plans, writes results/attacked_memory.json

Each method on the shape of Llama-3-8B in bfloat16, four examples of the longest lengths that its recipe allows, levers
on: pieces of two sequences, every block recomputed. ``streams`` are the peaks beyond weights, adapter and gradients,
head chunks left out, with the perturbations that are kept for the rest of the stream; ``ratio`` is the largest of all
over the largest of those without a perturbation. LAT has none of those: its are compared with the same streams without
their search.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

import torch

from benchmarks.harness import RESULTS, write_json
from repbend_fast.config import load_config
from repbend_fast.data.records import BatchSizes
from repbend_fast.environment import environment
from repbend_fast.models.decoder import find_decoder
from repbend_fast.objectives import Stream, build_objective
from repbend_fast.planning.batches import limits_of, worst_batch
from repbend_fast.planning.peaks import PeakMeter
from repbend_fast.planning.shapes import shape_model

RECORD = RESULTS / "attacked_memory.json"
RECIPES = {
    "repbend": "llama-3-8b-instruct",
    "circuit_breaker": "circuit-breaker-llama-3-8b-instruct",
    "crl": "crl-llama-3-8b-instruct",
    "x_boundary": "x-boundary-llama-3-8b-instruct",
    "lat": "lat-llama-3-8b-instruct",
}
ATTACKED = ("objective.refusal=1.0", "objective.adversarial.weight=1.0")
EXAMPLES = 4
CUDA = torch.device("cuda")


class Row(TypedDict):
    """Bytes of one method's step."""

    method: str
    recipe: str
    blocks: int
    longest: int
    streams: dict[str, int]
    without: int
    ratio: float


def row_of(method: str, recipe: str, *overrides: str) -> Row:
    """The peaks of one method's streams, carried to full depth from two shallow models."""
    attacked = () if method == "lat" else ATTACKED
    config = load_config(recipe, [*attacked, "memory.budget=null", *overrides])
    whole = shape_model(config.model, config.lora, (1,))
    blocks = find_decoder(whole).num_blocks
    objective = build_objective(config.objective, blocks, 1)
    last = (objective.last_state,)
    meter = PeakMeter(shape_model(config.model, config.lora, last), config, last, CUDA, "on")
    limits = limits_of(config)
    streams = objective.streams(worst_batch(BatchSizes(1, retain=2), limits), 0)
    peaks = {stream.name: _peak(meter, stream) for stream in streams}
    if method == "lat":
        without = max(_peak(meter, replace(stream, search=None)) for stream in streams)
    else:
        without = max(peaks[stream.name] for stream in streams if stream.search is None)
    ratio = round(max(peaks.values()) / without, 3)
    return Row(
        method=method,
        recipe=recipe,
        blocks=blocks,
        longest=limits.longest,
        streams=peaks,
        without=without,
        ratio=ratio,
    )


def _peak(meter: PeakMeter, stream: Stream) -> int:
    peak = meter.at_full_depth(stream, True)[0].total(0)
    search = stream.search
    # Those of the other examples are kept from their search to their pass.
    kept = search.rows * len(search.states) * meter.width * meter.itemsize if search else 0
    return peak + (EXAMPLES - 1) * kept


def main() -> int:
    rows = []
    for method, recipe in RECIPES.items():
        rows.append(row_of(method, recipe))
        print(method, rows[-1]["ratio"], flush=True)
    record = {**environment(), "planned": True, "examples": EXAMPLES, "rows": rows}
    write_json(RECORD, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
