"""What a step holds at its peak, tensor by tensor: ``benchmarks/results/step_peak_<hardware>.json``.

    python -m benchmarks.memory.at_peak [--case real] [--sides "peft+liger,ours small"]

One step of a side of the step benchmark, run for real under a dispatch mode that counts every storage from the
operation that made it to its end. Tensors of one operation, shape and dtype are one row. What the project's ops need
inside of themselves is a row of its own (``scratch``); what torch's own need inside is seen by the allocator alone, so
``train_step_*.json`` has the peaks to compare, and these rows say where they go.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, hardware_slug, write_json
from benchmarks.step.step_cases import LORA, Case, cases_for, load_base
from benchmarks.step.step_sides import Side, adapted, set_up, sides_for
from repbend_fast.environment import environment
from repbend_fast.models.causal import CausalLM
from repbend_fast.planning.scratch import HEAD_OPS, op_scratch
from repbend_fast.planning.tracker import MemoryTracker, module_tensors


class Held(TypedDict):
    """Tensors of one kind that are held at the peak; ``made_by`` names the operation."""

    made_by: str
    shape: list[int]
    dtype: str
    bytes: int


class Peak(TypedDict):
    """A side's peak above the model."""

    case: str
    side: str
    levers: dict[str, object]
    peak_bytes_above_model: int
    held: list[Held]


def peak_of(side: Side, case: Case, base: CausalLM) -> Peak:
    """One step of ``side``, tracked."""
    device = torch.device("cpu")
    batch = case.batch(base.config.get_text_config().vocab_size)
    kinds: dict[str, tuple[str, list[int], str]] = {}

    def kind(operation: str, tensor: Tensor) -> str:
        found = (operation.rpartition("::")[2], list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        key = str(found)
        kinds[key] = found
        return key

    with adapted(case, base) as model, set_up(side, case, model, LORA.dropout) as stepper:
        scratch = {name: rule for name, rule in op_scratch(device).items() if name not in HEAD_OPS}
        tracker = MemoryTracker(scratch=scratch, category=kind)
        tracker.watch(module_tensors(model), "model")
        with tracker:
            stepper.step(batch)
        levers = stepper.levers
    model_bytes = tracker.peak_categories.pop("model")
    held: list[Held] = []
    for key, size in tracker.peak_categories.most_common():
        made_by, shape, dtype = kinds.get(key, (key, [], ""))
        held += [{"made_by": made_by, "shape": shape, "dtype": dtype, "bytes": size}] if size else []
    above = tracker.peak - model_bytes
    return {"case": case.name, "side": side.name, "levers": levers, "peak_bytes_above_model": above, "held": held}


def table(peak: Peak, rows: int = 12) -> str:
    """Markdown: the largest kinds, and the rest together."""
    lines = [f"| {peak['side']}: made by | shape | MB |", "| --- | --- | ---: |"]
    for each in peak["held"][:rows]:
        shape = " × ".join(str(n) for n in each["shape"])
        lines.append(f"| `{each['made_by']}` | {shape} {each['dtype']} | {each['bytes'] / 1e6:.1f} |")
    rest = sum(each["bytes"] for each in peak["held"][rows:])
    lines.append(f"| the rest | | {rest / 1e6:.1f} |")
    lines.append(f"| together, above the model | | {peak['peak_bytes_above_model'] / 1e6:.1f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="real")
    parser.add_argument("--sides", default="peft+liger,ours small")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does it still run?")
    parser.add_argument("--out", type=Path, default=None)
    chosen = parser.parse_args()
    device = torch.device("cpu")
    case = next(each for each in cases_for(device, chosen.smoke) if chosen.case in each.name)
    sides = {side.name: side for side in sides_for(device, chosen.smoke)}
    base = load_base(case, device)
    peaks = [peak_of(sides[name], case, base) for name in chosen.sides.split(",")]
    out: Path = chosen.out or RESULTS / f"step_peak_{hardware_slug()}.json"
    write_json(out, {**environment(), "peaks": peaks})
    print("\n\n".join(table(peak) for peak in peaks))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
