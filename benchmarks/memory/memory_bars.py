"""Where the bytes of a step go, before and after, and what fits into which card: planned on fake tensors, nothing is
measured.

    python -m benchmarks.memory.memory_bars            plans, writes results/memory_plan.json, docs/memory.png and the
                                                       table of docs/memory.md
    python -m benchmarks.memory.memory_bars --draw     picture and table from the record again

Bars: the published step written plainly (``baselines/eager_step.py``, everything padded to 1024 tokens, all streams
alive until one backward) and ours, on the Llama-3-8B shape with a batch of 4 examples. Table: ``repbend-fast plan
--table``.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence as Seq
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypedDict, cast
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.baselines.eager_step import eager_step, prepare_eager
from benchmarks.harness import write_json
from repbend_fast.config import load_config
from repbend_fast.environment import environment
from repbend_fast.models import trainable_parameters
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.planning.batches import limits_of, published_batch
from repbend_fast.planning.cards import GB
from repbend_fast.planning.peaks import track_stream
from repbend_fast.planning.planned import PlannedRow
from repbend_fast.planning.planner import Planner, show_levers
from repbend_fast.planning.scratch import HEAD_OPS, op_scratch
from repbend_fast.planning.shapes import shape_model
from repbend_fast.planning.tracker import MemoryTracker, module_tensors
from repbend_fast.step.levers import Levers

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "memory_plan.json"
PICTURE = ROOT / "docs" / "memory.png"
DOCS = ROOT / "docs" / "memory.md"
MARKS = ("<!-- planned: benchmarks/memory/memory_bars.py -->", "<!-- planned: end -->")
CUDA = torch.device("cuda")
WIDTH = 1024
PARTS = (
    "weights",
    "adapter, gradients, optimizer",
    "reference and stacked states",
    "logits and head chunks",
    "activations",
)


class Bar(TypedDict):
    """The bytes of a step's peak by part."""

    label: str
    parts: dict[str, int]


class MemoryRecord(TypedDict):
    """What is drawn and written; the record has the machine's header too."""

    bars: list[Bar]
    table: list[PlannedRow]


def eager_bar(recipe: str) -> Bar:
    """Peak of the published step by part."""
    config = load_config(recipe)
    objective = cast(RepBendConfig, config.objective)
    model = shape_model(config.model, config.lora, objective.window)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    prepare_eager(model)
    batch = published_batch(config.training.sizes, limits_of(config), True, 0)

    def category(operation: str, tensor: Tensor) -> str:
        if tensor.shape[-1:] == (vocabulary,):
            return "logits"
        return (
            "states" if tensor.dim() == 4 and operation in ("aten::stack", "aten::mul", "aten::sub") else "activations"
        )

    tracker = MemoryTracker(category=category)
    trained = trainable_parameters(model)
    tracker.watch(module_tensors(model), "weights")
    tracker.watch(trained, "adapter")
    # The pairwise term selects by a mask, whose result has no shape without values; it is a few KB of the whole.
    with (
        tracker,
        patch("benchmarks.baselines.eager_step.published_pairwise_cosine", lambda states: states.float().mean()),
    ):
        eager_step(model, batch, objective, WIDTH)
    found = tracker.peak_categories
    # One accumulated gradient and two moments of each adapter weight, as in our own bars.
    state = 4 * found["adapter"]
    parts = (found["weights"], state, found["states"], found["logits"], found["activations"])
    return {"label": "published step,\nbf16", "parts": dict(zip(PARTS, parts))}


def our_bar(planner: Planner, label: str, budget: int | None, longest: bool) -> Bar:
    """Peak of the largest stream of our step by part, at the longest lengths or at published ones."""
    plan = planner.plan(budget, check=False)
    streams = planner.worst_streams(plan.levers) if longest else planner.expected[0]
    stream = max(streams, key=lambda s: plan.streams[s.name])

    def category(operation: str, tensor: Tensor) -> str:
        # Rows are gathered by indexing in the reference pass alone.
        return "states" if operation == "aten::index" and not torch.is_grad_enabled() else "activations"

    tracker = MemoryTracker(op_scratch(CUDA), apart=HEAD_OPS, category=category)
    here = replace(plan.levers, piece_tokens={}, offload_checkpoints=False, offload_embedding=False)
    track_stream(tracker, planner.model, stream, here, None)
    rows = stream.head_rows()
    chunks = planner.meter.chunk_bytes(rows, plan.levers.kl_chunk_rows) if rows else 0
    found = tracker.peak_categories
    head = max(0, (tracker.at_op or 0) + chunks - tracker.peak)
    state = sum(asdict(plan.standing)[name] for name in ("adapter", "gradients", "optimizer"))
    parts = (plan.standing.weights, state, found["states"], head, found["activations"] + found["scratch"])
    return {"label": label, "parts": dict(zip(PARTS, parts))}


def bars() -> list[Bar]:
    """The published step, then ours with and without recomputation and in NF4."""
    plain = Planner(load_config("llama-3-8b-instruct", ["memory.budget=null", "memory.checkpoint_blocks=auto"]), CUDA)
    packed = Planner(load_config("llama-3-8b-instruct", overlays="qlora"), CUDA)
    return [
        eager_bar("llama-3-8b-instruct"),
        our_bar(plain, "ours, bf16,\npublished lengths", None, longest=False),
        our_bar(plain, "ours, bf16,\n24 GB budget", 24 * GB, longest=True),
        our_bar(packed, "ours, NF4,\n12 GB budget", 12 * GB, longest=True),
        our_bar(packed, "ours, NF4,\n8 GB budget", 8 * GB, longest=True),
    ]


def table() -> list[PlannedRow]:
    """The rows of ``repbend-fast plan --table``."""
    from repbend_fast.cli import main as command

    with redirect_stdout(io.StringIO()) as printed:
        command(["plan", "--table", "--json"])
    rows: list[PlannedRow] = json.loads(printed.getvalue())
    return rows


def draw(record: MemoryRecord, path: Path) -> None:
    """One stacked bar per setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    labels = [bar["label"] for bar in record["bars"]]
    bottom = [0.0] * len(labels)
    for part in PARTS:
        sizes = [bar["parts"][part] / GB for bar in record["bars"]]
        axes.bar(labels, sizes, bottom=bottom, label=part, width=0.6)
        bottom = [b + s for b, s in zip(bottom, sizes)]
    for place, height in enumerate(bottom):
        axes.text(place, height, f"{height:.1f}", ha="center", va="bottom")
    axes.set_ylabel("GB at the peak of a step")
    axes.set_title("Llama-3-8B, 4 examples: where the bytes go (planned, not measured)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def markdown(rows: list[PlannedRow]) -> str:
    """The table's rows for the docs."""
    lines = [
        "| model | weights | budget | card | planned peak | s per step | levers |",
        "| --- | --- | ---: | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        model, weights = row["model"].rsplit("/", 1)[-1], "NF4" if row["quantization"] == "nf4" else "bf16"
        start = f"| {model} | {weights} | {cast(int, row['budget_bytes']) // GB} GB | {row['card']}"
        if row["levers"] is None:
            lines.append(f"{start} | does not fit below {row['smallest_bytes'] / GB:.1f} GB | | |")
        else:
            levers = show_levers(Levers(**row["levers"])).replace("; packing off", "")
            lines.append(f"{start} | {row['total_bytes'] / GB:.2f} GB | {row['seconds_per_step']:.1f} | {levers} |")
    return "\n".join(lines)


def write_docs(record: MemoryRecord) -> None:
    """Put the table between its marks in docs/memory.md, and draw the picture."""
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    heading = "Seconds are per optimizer step at published lengths; planned, not measured."
    body = f"\n![where the bytes of a step go](memory.png)\n\n{heading}\n\n{markdown(record['table'])}\n"
    DOCS.write_text(before + MARKS[0] + body + MARKS[1] + after, encoding="utf-8")
    draw(record, PICTURE)


def main(argv: Seq[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw from the record without planning")
    if not parser.parse_args(argv).draw:
        record = {**environment(), "planned": True, "bars": bars(), "table": table()}
        write_json(RECORD, record)
    write_docs(json.loads(RECORD.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
