"""The record of the step benchmark: written with a header, printed as a table, checked against the goals."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Machine, merged, write_json
from repbend_fast.environment import environment

Row = dict[str, Any]


@dataclass
class StepRecord:
    """``rows``: one per case and side; ``trained``: runs of several steps inside a cap."""

    rows: list[Row] = field(default_factory=list)
    trained: list[Row] = field(default_factory=list)

    def write(self, path: Path, machine: Machine) -> None:
        """Adds what was found to the file, under a header; nothing found changes nothing.

        A case is replaced as a whole: only sides of one run were measured in turn with each other.
        """
        if not self.rows and not self.trained:
            return
        kept = json.loads(path.read_text()) if path.exists() else {"rows": [], "trained": []}
        header = environment() | {"gemm_tflop_per_s": round(machine.matrix / 1e12, 3)}
        rows = _merged(kept["rows"], self.rows, header)
        record = {
            **header,
            "rows": rows,
            "ratios": ratios_of(rows),
            "trained": _merged(kept["trained"], self.trained, header),
        }
        write_json(path, record)


def _merged(kept: list[Row], fresh: list[Row], header: Row) -> list[Row]:
    return sorted(merged(kept, fresh, header, lambda row: row["case"]), key=lambda row: row["case"])


def ratios_of(rows: list[Row]) -> list[Row]:
    """Per case and side: how many times faster than each baseline, and the share of its memory above the model."""
    done = {(row["case"], row["side"]): row for row in rows if "failure" not in row}
    ratios = []
    for (case, side), row in done.items():
        found: Row = {"case": case, "side": side}
        for baseline, word in (("eager", "eager"), ("peft+liger", "peft_liger")):
            other = done.get((case, baseline))
            if other is not None and side != baseline:
                found[f"times_faster_than_{word}"] = round(other["seconds_median"] / row["seconds_median"], 3)
                found[f"memory_share_of_{word}"] = round(
                    row["peak_bytes_above_model"] / other["peak_bytes_above_model"], 4
                )
        if len(found) > 2:
            ratios.append(found)
    return ratios


def step_table(record: Row) -> str:
    """One line per case and side."""
    ratios = {(r["case"], r["side"]): r for r in record["ratios"]}
    lines = [
        f"{record['hardware']}, {record['threads']} CPU thread(s), torch {record['versions']['torch']}, commit "
        f"{record['commit']}, "
        f"{record['date']}; GEMM {record['gemm_tflop_per_s']} TFLOP/s",
        f"{'case':34} {'side':12} {'s':>9} {'tokens/s':>9} {'matrix':>7} {'GB above':>9} {'total':>7} {'vs eager':>16} "
        f"{'vs peft+liger':>16} {'loss error':>11} {'gradient':>9}",
    ]
    for row in record["rows"]:
        if "failure" in row:
            lines.append(f"{row['case']:34} {row['side']:12} {row['failure']}")
            continue
        own = ratios.get((row["case"], row["side"]), {})
        against = [
            f"{own[f'times_faster_than_{b}']:.2f}x {own[f'memory_share_of_{b}']:.3f}"
            if f"times_faster_than_{b}" in own
            else ""
            for b in ("eager", "peft_liger")
        ]
        lines.append(
            f"{row['case']:34} {row['side']:12} {row['seconds_median']:9.3f} {row['tokens_per_second']:9.1f} "
            f"{row['matrix_fraction']:7.2f} "
            f"{row['peak_bytes_above_model'] / 1e9:9.3f} {row['peak_bytes_total'] / 1e9:7.2f} {against[0]:>16} "
            f"{against[1]:>16} "
            f"{row['loss_relative_error']:11.1e} {row['gradient_relative_error']:9.1e}"
        )
    for row in record["trained"]:
        allocated = f", {row['peak_bytes_allocated'] / 1e9:.2f} GB allocated" if "peak_bytes_allocated" in row else ""
        lines.append(
            f"{row['case']:34} {row['steps']} steps in {row['budget']}: {row['tokens_per_second']:.1f} "
            f"tokens/s{allocated}"
        )
    return "\n".join(lines)


FLOAT32_ERROR = 1e-4
ANY_MEMORY = float("inf")
CPU_GOALS = (
    ("eager", {"real": (7.0, 1 / 8)}),
    ("eager", {"all-1024": (1.7, 1 / 5)}),
    ("peft+liger", {"real": (2.0, 0.75), "all-1024": (2.0, 0.75)}),
)
GPU_GOALS = (("eager", {"real": (6.0, ANY_MEMORY)}), ("peft+liger", {"real": (2.5, ANY_MEMORY)}))
"""Baseline, and for each case's lengths: times faster, share of its memory above the model. One of our sides is to
reach all of a goal's cases that the record has."""
GPU_MATRIX_FRACTION = 0.7
"""Of the measured matrix rate, that one of our sides is to reach in each case on a GPU."""


def missed_step_goals(record: Row) -> list[str]:
    """Goals on time, memory and agreement that the record has the rows for and does not reach."""
    missed = [
        f"{row['case']} {row['side']}: error above {FLOAT32_ERROR:g}"
        for row in record["rows"]
        if "-float32-" in row["case"]
        and max(row.get("loss_relative_error", 0), row.get("gradient_relative_error", 0)) > FLOAT32_ERROR
    ]
    ours = [r for r in record["ratios"] if r["side"].startswith("ours") and not r["case"].startswith("tiny")]
    for shape in sorted({_shape(r["case"]) for r in ours}):
        for baseline, cases in CPU_GOALS if "-float32-" in shape else GPU_GOALS:
            missed += _missed_against(baseline, cases, shape, [r for r in ours if _shape(r["case"]) == shape])
    return missed + _missed_on_a_gpu(
        [row for row in record["rows"] if "failure" not in row and row["side"].startswith("ours")]
    )


LENGTHS = ("real", "all-1024")


def _shape(case: str) -> str:
    """A case without its lengths."""
    return next((case.removesuffix(lengths) for lengths in LENGTHS if case.endswith(lengths)), case)


def _missed_against(baseline: str, cases: dict[str, tuple[float, float]], shape: str, ratios: list[Row]) -> list[str]:
    """One goal: a line for each of its cases, where no side of ours reaches it in all of them."""
    word = baseline.replace("+", "_")
    reached: dict[str, dict[str, bool]] = {}
    for row in ratios:
        lengths = row["case"].removeprefix(shape)
        if lengths in cases and f"times_faster_than_{word}" in row:
            speed, memory = cases[lengths]
            found = row[f"times_faster_than_{word}"] >= speed and row[f"memory_share_of_{word}"] <= memory
            reached.setdefault(row["side"], {})[lengths] = found
    there = list(dict.fromkeys(lengths for found in reached.values() for lengths in found))
    if not there or any(all(found.get(lengths, False) for lengths in there) for found in reached.values()):
        return []
    lines = []
    for lengths in there:
        speed, memory = cases[lengths]
        share = "" if memory == ANY_MEMORY else f" with {memory:g} of its memory"
        line = f"{shape}{lengths}: no one setting of ours is {speed:g} times as fast as {baseline}{share}"
        lines.append(f"{line} in both cases" if len(there) > 1 else line)
    return lines


def _missed_on_a_gpu(rows: list[Row]) -> list[str]:
    missed = []
    seconds = {(row["case"], row["side"]): row["seconds_median"] for row in rows}
    for case, side in seconds:
        if (
            side == "ours 12GB"
            and case.endswith("real")
            and seconds.get((case, "ours"), 0.0) < 0.9 * seconds[case, side]
        ):
            missed.append(f"{case} ours 12GB: below 0.9 of the uncapped speed")
    for case in sorted({row["case"] for row in rows if "-float32-" not in row["case"]}):
        best = max(row["matrix_fraction"] for row in rows if row["case"] == case)
        if best < GPU_MATRIX_FRACTION:
            missed.append(f"{case}: {best} of the matrix rate, the goal is {GPU_MATRIX_FRACTION}")
    return missed
