"""Launches and bytes of one micro-batch of the published step on a GPU, counted without one.

    python -m benchmarks.step.step_counts                                  # → benchmarks/results/step_counts.json
    python -m benchmarks.step.step_counts --blocks 3 --results FILE        # a few blocks of the same widths

Llama-3-8B's shape in NF4, four examples of the published lengths, on fake tensors that the project takes for CUDA ones
(``pretended_cuda``): all 32 blocks run, and beside them a few, which a test counts again. How it is counted stands in
``launches``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import torch

from benchmarks.harness import RESULTS, write_json
from benchmarks.step.launches import LaunchCounter
from benchmarks.step.pretended_cuda import pretended_cuda
from benchmarks.step.step_cases import LLAMA, LORA, Case, needed_flops, real_tokens
from repbend_fast.config.schema import MemoryConfig
from repbend_fast.environment import environment
from repbend_fast.models import prepared
from repbend_fast.models.causal import AdaptedLM
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.streams import Stream
from repbend_fast.planning.peaks import shallow
from repbend_fast.planning.shapes import FAKE_MODE, shape_model
from repbend_fast.step import StreamRunner
from repbend_fast.step.levers import levers_of

CASE = Case(LLAMA, "nf4", 4, "real")
BLOCKS = 32
FEW_BLOCKS = 3
"""Of the model that a test counts again."""
SETTINGS: Mapping[str, MemoryConfig] = {
    "streams apart": MemoryConfig(merge_streams="off"),
    "streams merged": MemoryConfig(merge_streams="on"),
}
"""Name and levers of what is counted."""
LAUNCH_GOALS = {"streams apart": 12_000, "streams merged": 6_000}
LORA_BYTES_GOAL = 140e9
COUNTED: tuple[Literal["launches", "bytes", "lora_bytes"], ...] = ("launches", "bytes", "lora_bytes")
PATH = RESULTS / "step_counts.json"
CARDS = {"H100": (700e12, 3.0e12), "4090": (150e12, 0.93e12)}
"""Matrix operations and copied bytes per second that such cards usually reach (docs/performance.md)."""
LAUNCH_SECONDS = 2e-6
"""The least that a kernel takes on a GPU."""


class PartCount(TypedDict):
    """One part of the step and kind of work."""

    part: str
    kind: str
    launches: int
    bytes: int
    flops: NotRequired[int]


class CountRow(TypedDict):
    """One setting at one depth. ``op_calls``: of the project's own ops, by part."""

    setting: str
    blocks: int
    launches: int
    bytes: int
    lora_bytes: int
    op_calls: NotRequired[dict[str, int]]
    levers: NotRequired[dict[str, object]]
    parts: list[PartCount]


class Earlier(TypedDict):
    """An earlier commit's counts: by this counter run on it, and as an earlier count had them."""

    commit: str
    rows: list[CountRow]
    published: dict[str, float]
    note: str


class CountRecord(TypedDict):
    """``results/step_counts.json``, without the environment in its header. ``needed_flops``: what no step can avoid on
    real tokens (``step_cases.needed_flops``).
    """

    case: str
    real_tokens: int
    needed_flops: int
    commit: str
    rows: list[CountRow]
    earlier: NotRequired[Earlier]


@dataclass(frozen=True)
class Subject:
    """What is counted: a model of ``blocks`` blocks, and the streams of one micro-batch as they see it."""

    blocks: int
    model: AdaptedLM
    streams: list[Stream]


def subject(blocks: int) -> Subject:
    """The case with the top ``blocks`` of its 32 blocks."""
    config = CASE.config(torch.device("cpu"))
    shallower = blocks < BLOCKS
    lora = LORA.model_copy(update={"blocks": list(range(blocks))}) if shallower else LORA
    model = shape_model(config.model, lora, CASE.objective.window, blocks if shallower else None)
    streams = build_objective(CASE.objective, BLOCKS).streams(CASE.batch(_vocabulary(model)), 0)
    if shallower:
        streams = [_as_shallow(stream, blocks) for stream in streams]
    return Subject(blocks, model, streams)


def count(subject: Subject, setting: str, memory: MemoryConfig) -> CountRow:
    """One micro-batch: all passes and backwards, without the optimizer."""
    counter = LaunchCounter()
    with pretended_cuda(counter.launched), FAKE_MODE:
        levers = levers_of(memory, subject.model)
        with prepared(subject.model, levers, liger="auto") as ready:
            runner = StreamRunner(ready, levers)
            with counter:
                runner.backward_all(subject.streams, dropout_seed=0)
        subject.model.zero_grad(set_to_none=True)
    parts = [
        PartCount(part=part, kind=kind, launches=found.launches, bytes=found.bytes, flops=found.flops)
        for (part, kind), found in sorted(counter.found.items())
    ]
    return CountRow(
        setting=setting,
        blocks=subject.blocks,
        launches=sum(part["launches"] for part in parts),
        bytes=sum(part["bytes"] for part in parts),
        lora_bytes=sum(part["bytes"] for part in parts if part["kind"] == "LoRA"),
        op_calls=dict(counter.calls),
        levers=levers.as_dict(),
        parts=parts,
    )


def missed_count_goals(record: CountRecord) -> list[str]:
    """Goals on launches and on LoRA's own bytes that the rows at full depth do not reach."""
    missed = []
    for row in record["rows"]:
        if row["blocks"] != BLOCKS:
            continue
        goal = LAUNCH_GOALS.get(row["setting"], 0)
        if goal and row["launches"] > goal:
            missed.append(f"{row['setting']}: {row['launches']} launches, the goal is {goal}")
        if row["lora_bytes"] > LORA_BYTES_GOAL:
            missed.append(
                f"{row['setting']}: {row['lora_bytes'] / 1e9:.0f} GB of LoRA's own traffic, the goal is "
                f"{LORA_BYTES_GOAL / 1e9:.0f}"
            )
    return missed


MOST_RISE = 0.03
"""Share by which launches or bytes may lie above the record."""


def risen(recorded: CountRow, counted: CountRow) -> list[str]:
    """What lies further above the record than it may."""
    return [
        f"{counted['setting']}, {counted['blocks']} blocks: {name} {counted[name]}, recorded {recorded[name]}"
        for name in COUNTED
        if counted[name] > (1 + MOST_RISE) * recorded[name]
    ]


def counts_table(record: CountRecord) -> str:
    """Kinds of work as lines, parts as columns: launches, and GB."""
    lines = [f"{record['case']}, {record['real_tokens']} tokens, commit {record['commit']}"]
    for row in record["rows"]:
        lines += ["", *_row_lines(row, row["setting"])]
    if earlier := record.get("earlier"):
        for row in earlier["rows"]:
            lines += ["", *_row_lines(row, f"commit {earlier['commit']}, {row['setting']}")]
    return "\n".join(lines)


def arithmetic(record: CountRecord) -> str:
    """Times that follow from the counts at full depth, in ms: arithmetic, no measurement.

    A kind of work takes its products at the card's rate, or its bytes at its bandwidth, or its launches at 2
    microseconds, whichever is longest; the share is that of ``needed_flops`` at the card's rate.
    """
    lines = ["", f"arithmetic, no measurement{'':10}" + "".join(f"{name:>12}" for name in CARDS)]
    for row in (row for row in record["rows"] if row["blocks"] == BLOCKS):
        totals = dict.fromkeys(CARDS, 0.0)
        lines.append(row["setting"])
        for kind in dict.fromkeys(part["kind"] for part in row["parts"]):
            parts = [part for part in row["parts"] if part["kind"] == kind]
            times = {name: 1e3 * max(_times(parts, *rates)) for name, rates in CARDS.items()}
            lines.append(f"  {kind:34}" + "".join(f"{ms:12.1f}" for ms in times.values()))
            totals = {name: totals[name] + ms for name, ms in times.items()}
        floors = {name: 1e3 * record["needed_flops"] / rate for name, (rate, _) in CARDS.items()}
        lines.append(f"  {'all':34}" + "".join(f"{ms:12.1f}" for ms in totals.values()))
        lines.append(f"  {'share of the floor':34}" + "".join(f"{floors[n] / totals[n]:12.2f}" for n in CARDS))
    return "\n".join(lines)


def _times(parts: list[PartCount], rate: float, bandwidth: float) -> tuple[float, float, float]:
    return (
        sum(part.get("flops", 0) for part in parts) / rate,
        sum(part["bytes"] for part in parts) / bandwidth,
        LAUNCH_SECONDS * sum(part["launches"] for part in parts),
    )


def _row_lines(row: CountRow, title: str) -> list[str]:
    parts = {(p["part"], p["kind"]): p for p in row["parts"]}
    columns = list(dict.fromkeys(part for part, _ in parts))
    kinds = sorted(
        {kind for _, kind in parts}, key=lambda k: -sum(p["launches"] for p in row["parts"] if p["kind"] == k)
    )
    lines = [
        f"{title}, {row['blocks']} blocks: {row['launches']} launches, {row['bytes'] / 1e9:.0f} GB, of them LoRA's own "
        f"{row['lora_bytes'] / 1e9:.0f} GB",
        f"{'launches (GB)':16}" + "".join(f"{column:>18}" for column in columns),
    ]
    for kind in kinds:
        cells = [parts.get((column, kind)) for column in columns]
        lines.append(
            f"{kind:16}" + "".join(f"{c['launches']:9} ({c['bytes'] / 1e9:5.1f})" if c else " " * 18 for c in cells)
        )
    return lines


def write_counts(path: Path, rows: list[CountRow], tokens: int, needed: int) -> CountRecord:
    """Writes the rows under a header; an earlier commit's counts stay."""
    kept: CountRecord | None = json.loads(path.read_text()) if path.exists() else None
    header = environment()
    record = CountRecord(
        case=CASE.name, real_tokens=tokens, needed_flops=needed, commit=str(header["commit"]), rows=rows
    )
    if kept and "earlier" in kept:
        record["earlier"] = kept["earlier"]
    write_json(path, {**header, **record})
    return record


def _vocabulary(model: AdaptedLM) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _as_shallow(stream: Stream, blocks: int) -> Stream:
    # The last hidden state is read behind the final norm; no other is that of the model's last block.
    stop = stream.stop(BLOCKS)
    return shallow(stream, stop, blocks if stop == BLOCKS else blocks - 1)[0]


def main(arguments: list[str] | None = None) -> int:
    """Counts, prints and records; exit status 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[FEW_BLOCKS, BLOCKS])
    parser.add_argument("--results", type=Path, default=PATH)
    chosen = parser.parse_args(arguments)
    rows = []
    for blocks in sorted(chosen.blocks):
        counted = subject(blocks)
        rows += [count(counted, setting, memory) for setting, memory in SETTINGS.items()]
    batch = CASE.batch(_vocabulary(counted.model))
    needed = needed_flops(CASE, counted.model, batch, 0) if counted.blocks == BLOCKS else 0
    record = write_counts(chosen.results, rows, real_tokens(batch), needed)
    print(counts_table(record))
    if needed:
        print(arithmetic(record))
    missed = missed_count_goals(record)
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
