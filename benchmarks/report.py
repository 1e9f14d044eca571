"""Draws a record of the op benchmarks, the step's, its profile's, its counts' or the demo's: a table; for the ops bars
as a PNG with matplotlib.

    python -m benchmarks.report [benchmarks/results/cpu.json] [--png FILE]

Exit status 1 if the record misses a goal that it has the rows for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.demo.demo_record import demo_table, missed_demo_goals
from benchmarks.ops.op_record import COSTS, OpRecord, OpRow
from benchmarks.step.profile_parts import profile_table
from benchmarks.step.step_counts import counts_table, missed_count_goals
from benchmarks.step.step_record import missed_step_goals, step_table

RESULTS = Path(__file__).parent / "results"


def baseline(rows: list[OpRow], row: OpRow) -> OpRow | None:
    """The eager row of the same op and case."""
    same = [r for r in rows if (r["op"], r["case"], r["contender"]) == (row["op"], row["case"], "eager")]
    return same[0] if same else None


def mebibytes(count: int) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:.1f}"


def rate(row: OpRow) -> str:
    """The row's rate with its share of the machine's own."""
    if "gb_per_s" in row:
        return f"{row['gb_per_s']:.1f} GB/s ({row['percent_of_copy']:.0f} % of copy)"
    return f"{row['tflop_per_s']:.3f} TFLOP/s ({row['percent_of_gemm']:.0f} % of GEMM)" if "tflop_per_s" in row else ""


def table(record: OpRecord) -> str:
    """The record as text: one line per contender, eager's multiple in time and memory beside it."""
    rows = record["rows"]
    lines = [
        f"{record['hardware']}, {record['threads']} CPU thread(s), torch {record['versions']['torch']}, commit "
        f"{record['commit']}, "
        f"{record['date']}; copy {record['copy_gb_per_s']} GB/s, GEMM {record['gemm_tflop_per_s']} TFLOP/s",
        f"{'op':16} {'case':32} {'contender':28} {'ms':>10} {'vs eager':>9} {'MiB':>9} {'of it returned':>14} "
        f"{'vs eager':>9} "
        f"{'error value':>11} {'gradient':>9}  rate",
    ]
    for row in rows:
        eager = baseline(rows, row)
        faster = f"{eager['median_ms'] / row['median_ms']:.2f}x" if eager else ""
        smaller = f"1/{eager['peak_bytes'] / max(row['peak_bytes'], 1):.1f}" if eager else ""
        lines.append(
            f"{row['op']:16} {row['case']:32} {row['contender']:28} {row['median_ms']:10.3f} {faster:>9} "
            f"{mebibytes(row['peak_bytes']):>9} "
            f"{mebibytes(row['returned_bytes']):>14} {smaller:>9} {row['error_value']:11.1e} "
            f"{row['error_gradient']:9.1e}  {rate(row)}"
        )
    return "\n".join(lines)


TAP_SHARE = 85
"""Per cent of a device copy's bandwidth that ``bend_tap`` is to reach on a GPU, forward and backward."""
PRODUCTS = 1.15
"""Times the time of its three products that ``linear_kl_div`` may take on a GPU."""
GPU_CASES = {"bend_tap": "16384x4096 16384 rows", "linear_kl_div": "2048x4096x128256"}


def missed_gpu_goals(record: OpRecord) -> list[str]:
    """Goals on bandwidth and on the products' time, at the sizes that they name."""
    rows = {(r["op"], r["case"], r["contender"]): r for r in record["rows"]}
    missed = []
    for direction in ("forward", "backward"):
        row = rows.get(("bend_tap", f"{GPU_CASES['bend_tap']}, {direction}", "ours"))
        if row and row["percent_of_copy"] < TAP_SHARE:
            missed.append(
                f"bend_tap {direction}: {row['percent_of_copy']} % of a copy's bandwidth, the goal is {TAP_SHARE}"
            )
    others = {
        row["contender"]: row
        for row in record["rows"]
        if (row["op"], row["case"]) == ("linear_kl_div", GPU_CASES["linear_kl_div"])
    }
    ours = others.pop("ours", None)
    # In chunks or all at once, whichever is faster: chunks that are bad for the products must not look good here.
    floors = [
        others.pop(contender)["median_ms"] for contender in list(others) if contender.startswith("its three products")
    ]
    if ours and floors and ours["median_ms"] > PRODUCTS * min(floors):
        missed.append(
            f"linear_kl_div: {ours['median_ms'] / min(floors):.2f} times its three products, the goal is {PRODUCTS}"
        )
    for contender, row in others.items() if ours else ():
        missed += [f"linear_kl_div: {key} above {contender}'s" for key in COSTS if ours and ours[key] > row[key]]
    return missed


def missed_goals(record: OpRecord) -> list[str]:
    """Goals on memory, time and error of the distance and the KL, checked where the record has their rows."""
    missed = missed_gpu_goals(record) if record.get("device") == "cuda" else []
    for op, contender, share in (("window_distance", "ours, consume_references", 10), ("linear_kl_div", "ours", 8)):
        for row in (r for r in record["rows"] if r["op"] == op and r["contender"] == contender):
            eager = baseline(record["rows"], row)
            if eager is None:
                continue
            if row["peak_bytes"] * share > eager["peak_bytes"]:
                missed.append(f"{op} {row['case']}: memory above 1/{share} of eager's")
            if row["median_ms"] > eager["median_ms"]:
                missed.append(f"{op} {row['case']}: slower than eager")
            # Float32 sums of either side differ in the last digits; a tenth of a part per million is the same.
            if row["error_gradient"] > max(eager["error_gradient"], 1e-7) * 1.05:
                missed.append(f"{op} {row['case']}: gradient error above eager's")
    return missed


def draw(record: OpRecord, path: Path) -> None:
    """Time and memory of every contender as a multiple of eager's, one bar each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = [(row, baseline(record["rows"], row)) for row in record["rows"]]
    pairs = [(row, eager) for row, eager in compared if eager is not None and row["contender"] != "eager"]
    labels = [f"{row['op']}  {row['case']}\n{row['contender']}" for row, _ in pairs]
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 1.5 + 0.42 * len(pairs)), sharey=True, layout="constrained")
    for axis, key, title in zip(axes, COSTS, ("time, eager = 1", "peak memory above inputs, eager = 1")):
        axis.barh(labels, [row[key] / max(eager[key], 1e-9) for row, eager in pairs], color="#3b6ea5")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel(title)
    axes[0].invert_yaxis()
    axes[0].tick_params(axis="y", labelsize=7)
    figure.suptitle(record["hardware"])
    figure.savefig(path, dpi=110)


def kind_of(record: Mapping[str, Any]) -> str:
    """What made the record: ``ops``, ``step``, ``counts``, ``profile`` or ``demo``."""
    if "ratios" in record:
        return "step"
    if any("launches" in row for row in record.get("rows", ())):
        return "counts"
    if "seeds" in record:
        return "demo"
    return "profile" if any("parts" in row for row in record["rows"]) else "ops"


def main() -> int:
    """Prints the table; draws where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, nargs="?", default=RESULTS / "cpu.json")
    parser.add_argument("--png", type=Path, default=None)
    arguments = parser.parse_args()
    if not arguments.record.exists():
        parser.error(f"{arguments.record}: no such record; make one with `make bench`")
    record = json.loads(arguments.record.read_text())
    kind = kind_of(record)
    if kind != "ops" and arguments.png:
        parser.error("--png draws records of the ops")
    tables: dict[str, Callable[[Any], str]] = {
        "step": step_table,
        "profile": profile_table,
        "counts": counts_table,
        "demo": demo_table,
        "ops": table,
    }
    print(tables[kind](record))
    if arguments.png:
        draw(record, arguments.png)
    goals: dict[str, Callable[[Any], list[str]]] = {
        "step": missed_step_goals,
        "counts": missed_count_goals,
        "demo": missed_demo_goals,
        "ops": missed_goals,
    }
    missed = goals[kind](record) if kind in goals else []
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
