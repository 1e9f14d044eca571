"""Adds up a ``torch.profiler`` trace by part of the step and kind of work: what ran, and in which range of
``repbend_fast.ranges``.

On a CPU the time is each op's own; on a GPU it is each kernel's, under the op that launched it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from repbend_fast import ranges

Row = dict[str, Any]
"""One case and side of the record: ``seconds`` of a plain step, ``parts`` with (part, kind, seconds)."""

OPTIMIZER = "Optimizer.step#"
OUTSIDE = "outside"
KINDS = (
    ("head", ("repbend_kernels::linear_",)),
    (
        "LoRA",
        (
            "repbend_kernels::low_rank",
            "repbend_kernels::add_low_rank",
            "repbend_kernels::keyed_dropout",
            # Launched without an op around them.
            "lora_down_",
            "lora_up_",
            "sum_parts_",
        ),
    ),
    (
        "norms and gates",
        ("repbend_kernels::rms_norm", "repbend_kernels::gated_product", "Liger", "aten::silu", "aten::rsqrt"),
    ),
    ("distances", ("repbend_kernels::",)),
    ("dequantisation", ("bitsandbytes::dequantize", "kDequantize", "dequantize")),
    (
        "attention",
        (
            "aten::scaled_dot_product",
            "aten::_scaled_dot_product",
            "aten::_flash_attention",
            "aten::_efficient_attention",
            "flash_",
        ),
    ),
    (
        "matrix products",
        ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "bitsandbytes::gemm", "sgemm", "gemm"),
    ),
)
RUNTIME = re.compile(r"cuda|cu[A-Z]|hip")
OTHER = "the rest"
WAITING = "Python and dispatch"


@dataclass(frozen=True)
class Slice:
    """Some time that was spent, in microseconds from the start of the trace.

    Attributes:
        start, duration: on the device that spent it; on a CPU ``duration`` is the op's own time, without the ops inside
            of it.
        began: when the op that did it began on the host; None = unknown.
        names: the op and what it lies in, outermost first, and on a GPU the kernel.
    """

    start: float
    duration: float
    began: float | None
    names: tuple[str, ...]


class Ranges:
    """The marked parts of a trace. Ranges of one name do not overlap."""

    def __init__(self, found: Iterable[tuple[str, float, float]]) -> None:
        self._by_name: dict[str, tuple[list[float], list[float]]] = {}
        for name, start, end in sorted(found, key=lambda r: r[1]):
            starts, ends = self._by_name.setdefault(name, ([], []))
            starts.append(start)
            ends.append(end)

    def part(self, time: float) -> str:
        """The part of the step that is in progress on the host at ``time``."""
        inside = {name for name in self._by_name if self._holds(name, time)}
        if OPTIMIZER in inside:
            return "optimizer"
        if ranges.BACKWARD in inside:
            return "recomputed blocks" if ranges.CHECKPOINTED in inside else "backward"
        for name in (ranges.REFERENCE, ranges.SUMS, ranges.ADAPTED):
            if name in inside:
                return name.removeprefix("repbend: ")
        return OUTSIDE

    def _holds(self, name: str, time: float) -> bool:
        starts, ends = self._by_name[name]
        index = bisect_right(starts, time) - 1
        return index >= 0 and time < ends[index]


def kind_of(names: Sequence[str]) -> str:
    """The kind of work, by the outermost name that says it."""
    for name in names:
        for kind, marks in KINDS:
            if name.startswith(marks) or (kind == "matrix products" and "gemm" in name):
                return kind
    return WAITING if not names or names[-1].startswith(("repbend: ", OPTIMIZER)) else OTHER


def add_up(slices: Iterable[Slice], marked: Ranges) -> dict[tuple[str, str], float]:
    """Seconds per (part, kind). A kernel whose launch is unknown belongs to the part of the one before it."""
    total: dict[tuple[str, str], float] = defaultdict(float)
    part = OUTSIDE
    for piece in sorted(slices, key=lambda s: s.start):
        part = part if piece.began is None else marked.part(piece.began)
        total[part, kind_of(piece.names)] += piece.duration / 1e6
    return dict(total)


def busy_seconds(slices: Iterable[Slice]) -> float:
    """Seconds in which at least one of the slices ran; for kernels, whose streams overlap."""
    busy, until = 0.0, float("-inf")
    for piece in sorted(slices, key=lambda s: s.start):
        end = piece.start + piece.duration
        busy += max(0.0, end - max(piece.start, until))
        until = max(until, end)
    return busy / 1e6


def read(profile: Any, cuda: bool) -> tuple[list[Slice], Ranges]:
    """The slices and ranges of a finished ``torch.profiler.profile``."""
    events = [event for event in profile.events() if event.device_type == DeviceType.CPU]
    marks = []
    for event in events:
        name = OPTIMIZER if event.name.startswith(OPTIMIZER) else event.name
        if name.startswith(("repbend: ", OPTIMIZER)):
            marks.append((name, event.time_range.start, event.time_range.end))
    if not cuda:
        own = [
            Slice(e.time_range.start, e.self_cpu_time_total, e.time_range.start, _names(e))
            for e in events
            if not _is_memory(e)
        ]
        return own, Ranges(marks)
    results = profile.profiler.kineto_results
    # Calls of the CUDA runtime are events of the CPU too, with numbers of their own that are also those of ops.
    ops = {event.id: event for event in events if not RUNTIME.match(event.name)}
    slices = []
    for kernel in results.events():
        if (
            kernel.device_type() != DeviceType.CUDA
            or kernel.is_user_annotation()
            or kernel.name().startswith(("repbend: ", OPTIMIZER))
        ):
            continue
        link = kernel.linked_correlation_id()
        op = ops.get(link) if link > 0 else None
        start = (kernel.start_ns() - results.trace_start_ns()) / 1e3
        names = (*(_names(op) if op else ()), kernel.name())
        slices.append(Slice(start, kernel.duration_ns() / 1e3, op.time_range.start if op else None, names))
    return slices, Ranges(marks)


def _is_memory(event: FunctionEvent) -> bool:
    return event.name == "[memory]"


def _names(event: FunctionEvent | None) -> tuple[str, ...]:
    names: list[str] = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return tuple(reversed(names))


def accounted(row: Row) -> float:
    """The share of the step's time that the parts and idling add up to: of the plain step on a GPU, of the profiled one
    on a CPU.
    """
    named = sum(part["seconds"] for part in row["parts"])
    return (named + row["idle_seconds"]) / row["seconds"] if "idle_seconds" in row else named / row["seconds_profiled"]


def profile_table(record: Row) -> str:
    """Parts as lines, kinds as columns, seconds; the last line and column are shares of all."""
    lines = [f"{record['hardware']}, {record['threads']} CPU thread(s), torch {record['versions']['torch']}"]
    for row in record["rows"]:
        if "failure" in row:
            lines += ["", f"{row['case']}, {row['side']}: {row['failure']}"]
            continue
        spent = {(p["part"], p["kind"]): p["seconds"] for p in row["parts"]}
        idle = row.get("idle_seconds", 0.0)
        whole = sum(spent.values()) + idle
        kinds = sorted({kind for _, kind in spent}, key=lambda k: -_sum(spent, 1, k))
        parts = sorted({part for part, _ in spent}, key=lambda p: -_sum(spent, 0, p))
        lines += [
            "",
            f"{row['case']}, {row['side']}: {row['seconds']:.3f} s a step; {accounted(row):.0%} accounted for",
        ]
        lines.append(f"{'':36}" + "".join(f"{kind:>21}" for kind in kinds) + f"{'share':>8}")
        for part in parts:
            cells = "".join(f"{spent.get((part, kind), 0.0):21.4f}" for kind in kinds)
            lines.append(f"{part:36}{cells}{_sum(spent, 0, part) / whole:8.1%}")
        if idle:
            lines.append(f"{'idle':36}" + " " * 21 * len(kinds) + f"{idle / whole:8.1%}")
        lines.append(f"{'share':36}" + "".join(f"{_sum(spent, 1, kind) / whole:21.1%}" for kind in kinds))
    return "\n".join(lines)


def _sum(spent: dict[tuple[str, str], float], place: int, name: str) -> float:
    return sum(seconds for key, seconds in spent.items() if key[place] == name)
