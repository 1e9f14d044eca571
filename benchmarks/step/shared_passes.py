"""Our step in its layouts, interleaved on a CPU: padded or packed, streams in passes of their own or in shared ones.

    taskset -c 1 python -m benchmarks.step.shared_passes      # writes benchmarks/results/shared_passes_cpu.json

Real lengths, a small model, one thread. What counts is CPU time, as in ``step_versions``: blocks of steps in turn, and
the ratio of medians to the first layout.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, write_json
from benchmarks.step import step_cases, step_sides
from benchmarks.step.step_versions import SHAPE, WINDOW, Times, timed_block
from repbend_fast.environment import environment

RECORD = RESULTS / "shared_passes_cpu.json"
LAYOUTS: dict[str, dict[str, str]] = {
    "packed": {"packing": "on", "merge_streams": "off"},
    "packed, merged": {"packing": "on", "merge_streams": "on"},
    "padded": {"packing": "off", "merge_streams": "off"},
    "padded, merged": {"packing": "off", "merge_streams": "on"},
}


def measured(width: int, examples: int, blocks: int, steps: int) -> dict[str, list[Times]]:
    """Blocks of every layout in turn, on one model and batch, which give equal terms."""
    torch.set_num_threads(1)
    case = step_cases.Case(step_cases.Model("small", WINDOW), "float32", examples, "real", width=width)
    base = step_cases.load_base(case, torch.device("cpu"))
    batch = case.batch(int(SHAPE["vocab_size"]))
    found: dict[str, list[Times]] = {name: [] for name in LAYOUTS}
    with step_sides.adapted(case, base) as model:
        for number in range(blocks):
            for name in list(LAYOUTS) if number % 2 == 0 else reversed(LAYOUTS):
                side = step_sides.Side("ours", LAYOUTS[name])
                with step_sides.set_up(side, case, model, step_cases.LORA.dropout) as stepper:
                    found[name].append(timed_block(lambda: stepper.step(batch), model.zero_grad, steps))
    for name, value in found["packed"][0]["terms"].items():
        for layout, times in found.items():
            assert math.isclose(times[0]["terms"][name], value, rel_tol=1e-4, abs_tol=1e-6), (layout, name)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="most tokens of a conversation")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=6, help="of steps, per layout")
    parser.add_argument("--steps", type=int, default=2, help="counted, per block")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args(arguments)
    step_cases.TINY_SHAPE.update(SHAPE)
    found = measured(options.width, options.examples, options.blocks, options.steps)
    medians = {name: statistics.median(s for times in every for s in times["cpu"]) for name, every in found.items()}
    record = {
        **environment(),
        "model": SHAPE,
        "width": options.width,
        "examples": options.examples,
        "layouts": LAYOUTS,
        "cpu_seconds_median": {name: round(seconds, 4) for name, seconds in medians.items()},
        "cpu_ratio": {name: round(seconds / medians["packed"], 3) for name, seconds in medians.items()},
        "blocks": {name: [[round(s, 4) for s in times["cpu"]] for times in every] for name, every in found.items()},
    }
    write_json(options.out, record)
    print(json.dumps(record["cpu_ratio"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
