"""The record of the step benchmark: written with a header, printed as a table, checked against the goals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Machine, environment

Row = dict[str, Any]


def write_step_record(path: Path, rows: list[Row], ratios_of: Callable[[list[Row]], list[Row]], machine: Machine) -> None:
    """Writes rows and ratios under a header; cases that this run left out stay as they were.

    A case is replaced as a whole: only sides of one run were measured in turn with each other.
    """
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    cases = {row["case"] for row in rows}
    header = environment() | {"gemm_tflop_per_s": round(machine.matrix / 1e12, 3)}
    fresh = [row | {"commit": header["commit"], "date": header["date"]} for row in rows]
    everything = sorted([row for row in kept if row["case"] not in cases] + fresh, key=lambda row: row["case"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header, "rows": everything, "ratios": ratios_of(everything)}, indent=1) + "\n")


def step_table(record: dict[str, Any]) -> str:
    """One line per case and side."""
    ratios = {(r["case"], r["side"]): r for r in record["ratios"]}
    lines = [
        f"{record['hardware']}, {record['threads']} CPU thread(s), torch {record['versions']['torch']}, commit {record['commit']}, "
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
            f"{own[f'times_faster_than_{b}']:.2f}x {own[f'memory_share_of_{b}']:.3f}" if f"times_faster_than_{b}" in own else ""
            for b in ("eager", "peft_liger")
        ]
        lines.append(
            f"{row['case']:34} {row['side']:12} {row['seconds_median']:9.3f} {row['tokens_per_second']:9.1f} {row['matrix_fraction']:7.2f} "
            f"{row['peak_bytes_above_model'] / 1e9:9.3f} {row['peak_bytes_total'] / 1e9:7.2f} {against[0]:>16} {against[1]:>16} "
            f"{row['loss_relative_error']:11.1e} {row['gradient_relative_error']:9.1e}"
        )
    return "\n".join(lines)
