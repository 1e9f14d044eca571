"""Compiles every Triton kernel for GPUs that are not there, and records what each program would use.

    python -m benchmarks.ops.cubin_report                      # writes benchmarks/results/cubin_resources.json

Rows: kernel, dtype, sm, registers, shared_bytes, spill_bytes (stack and local memory), loads_128bit (LDG and LDGSTS of
128 bits and more in the SASS), warps.
No GPU is needed: Triton's own ptxas makes the machine code and its cuobjdump reads it back.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton
from repbend_kernels.low_rank_sizes import (
    DOWN_BACK_ROWS,
    SUM_BLOCK,
    UP_COLUMNS,
    UP_RANK,
    UP_ROWS,
    WARPS,
    down_rows,
    tiles,
    up_back_rows,
)
from repbend_kernels.triton import dequantize_nf4 as nf4
from repbend_kernels.triton import keyed_dropout as dropout
from repbend_kernels.triton import linear_kl_div as kl
from repbend_kernels.triton import linear_log_prob as log_prob
from repbend_kernels.triton import low_rank, low_rank_down
from repbend_kernels.triton import pairwise_cosine as pairwise
from repbend_kernels.triton import row_distance as rows
from repbend_kernels.triton import tap_rows as taps
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.harness import RESULTS

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DTYPES = ("fp32", "bf16", "fp16")
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESULT = RESULTS / "cubin_resources.json"
# (adapter's dtype, rank): the published rank, and the largest that is compiled without spills.
LOW_RANKS = {
    "fp32": (("fp32", 16), ("fp32", 128)),
    "bf16": (("fp32", 16), ("bf16", 16), ("fp32", 128)),
    "fp16": (("fp32", 16), ("fp16", 16)),
}
# (adapter's dtype, rank of each, layers): of layers that read one x, q, k and v or gate and up.
SHARED_RANKS = {
    "fp32": (("fp32", 16, 3),),
    "bf16": (("fp32", 16, 2), ("fp32", 16, 3), ("bf16", 16, 3)),
    "fp16": (("fp32", 16, 3),),
}
# A block of 8 warps at 128 registers leaves two blocks on every architecture here, and its shared memory at least that
# many; nothing may touch local memory.
LIMITS = {"registers": 128, "shared_bytes": 20 * 1024, "spill_bytes": 0}
# A matrix product's operands wait in shared memory, its sums in registers: two blocks of 4 warps fit everywhere.
MATRIX_KERNELS = ("lora_down", "lora_up")
MATRIX_LIMITS = {"registers": 255, "shared_bytes": 48 * 1024, "spill_bytes": 0}


@dataclass(frozen=True)
class Case:
    """One specialisation: a kernel, the types of its arguments, the values known at compile time, its warps, and the
    most registers of a thread that the launch asks for.
    """

    name: str
    kernel: triton.JITFunction
    dtype: str
    types: dict[str, str]
    constants: Mapping[str, object]
    warps: int
    unaligned: frozenset[str] = field(default_factory=frozenset)
    registers: int | None = None


def _row_case(name: str, dtype: str, width: int, **constants: object) -> Case:
    pointer = f"*{dtype}"
    types = {
        **dict.fromkeys(("hidden", "reference", "target"), pointer),
        **{"rows": "*i64", "mask": "*u8", "grad_rows": "*fp32", "distances": "*fp32", "place": "*i32"},
        **dict.fromkeys(("count_n", "width", "h_inner", "h_outer_stride", "h_inner_stride"), "i32"),
        **dict.fromkeys(("r_inner", "r_outer_stride", "r_inner_stride", "grad_stride"), "i32"),
    }
    whole = width <= rows.WHOLE_ROW
    launch = rows.size_rule(width, rows.WHOLE_ROW)
    known = {
        "h_stride": 1,
        "r_stride": 1,
        "H_FLAT": True,
        "R_FLAT": True,
        "WHOLE": whole,
        "BLOCK": launch.block if whole else rows.WHOLE_ROW // 2,
        **constants,
    }
    warps, registers = (launch.warps, rows.WHOLE_REGISTERS) if whole else (8, None)
    return Case(name, rows.row_distance_kernel, dtype, types, known, warps, frozenset({"grad_stride"}), registers)


def _distance_cases(dtype: str) -> list[Case]:
    tap = {"HAS_ROWS": True, "HAS_MASK": False, "HAS_PLACE": True, "STORE": rows.DIRECTION}
    cases = [_row_case(f"bend_tap_forward[{kind}]", dtype, 4096, KIND=kind, **tap) for kind in ("mse", "relu_cosine")]
    # Of a view whose sequences lie more than their rows apart.
    cases.append(_row_case("bend_tap_forward[l2,view]", dtype, 4096, KIND="l2", H_FLAT=False, **tap))
    for kind in ("l2", "cosine"):
        window = {"KIND": kind, "HAS_ROWS": False, "HAS_MASK": True, "HAS_PLACE": False}
        cases += [
            _row_case(f"bend_tap_forward[{kind}]", dtype, 4096, KIND=kind, **tap),
            _row_case(f"bend_tap_forward[{kind},wide]", dtype, 16384, KIND=kind, **tap),
            _row_case(f"window_distance_forward[{kind}]", dtype, 4096, STORE=rows.NONE, **window),
            _row_case(f"window_distance_backward[{kind}]", dtype, 4096, STORE=rows.GRADIENT, **window),
        ]
    return cases


def _add_rows_case(dtype: str) -> Case:
    pointer = f"*{dtype}"
    types = {"grad": pointer, "direction": pointer, "rows": "*i64", "place": "*i32", "scale": "*fp32", "out": pointer}
    types |= dict.fromkeys(("count_r", "width", "g_inner", "g_outer_stride", "g_inner_stride"), "i32")
    launch = rows.size_rule(4096, rows.WHOLE_ROW // 2)
    constants = {"g_stride": 1, "HAS_GRAD": True, "HAS_SCALE": True, "FLAT": True, "BLOCK": launch.block}
    return Case(
        "bend_tap_backward", rows.add_rows_kernel, dtype, types, constants, launch.warps, frozenset({"count_r"})
    )


def _gather_case(dtype: str) -> Case:
    pointer = f"*{dtype}"
    types = {"hidden": pointer, "rows": "*i64", "out": pointer, "place": "*i32"}
    types |= dict.fromkeys(("count_n", "width", "h_inner", "h_outer_stride", "h_inner_stride"), "i32")
    launch = rows.size_rule(4096, taps.COLUMNS)
    constants = {"h_stride": 1, "HAS_PLACE": True, "FLAT": True, "BLOCK": launch.block}
    return Case("tap_rows", taps.gather_rows_kernel, dtype, types, constants, launch.warps, frozenset({"count_n"}))


def _pairwise_cases(dtype: str) -> list[Case]:
    pointer, wide = f"*{dtype}", "*fp32"
    sizes = dict.fromkeys(("batch", "width", "stride_l", "stride_b"), "i32")
    loose = frozenset({"batch", "scale_stride"})
    walk, columns = rows.size_rule(4096, pairwise.WALK), rows.size_rule(4096, pairwise.COLUMNS)
    forward = {"states": pointer, "inverse": wide}
    backward = {
        "states": pointer,
        "summed": wide,
        "inverse": wide,
        "scale": wide,
        "grad": pointer,
        "scale_stride": "i32",
    }
    sums = {**forward, "summed": wide, "partial": wide}
    known = {"stride_d": 1, "BLOCK": walk.block}
    return [
        Case(
            "pairwise_cosine_lengths",
            pairwise.inverse_length_kernel,
            dtype,
            {**forward, **sizes},
            known,
            walk.warps,
            loose,
        ),
        Case(
            "pairwise_cosine_sums",
            pairwise.unit_sum_kernel,
            dtype,
            {**sums, **sizes},
            {"stride_d": 1, "BLOCK": columns.block},
            columns.warps,
            loose,
        ),
        Case(
            "pairwise_cosine_backward",
            pairwise.unit_sum_backward_kernel,
            dtype,
            {**backward, **sizes},
            known,
            walk.warps,
            loose,
        ),
    ]


def _dropout_case(dtype: str, keys: str) -> Case:
    pointer = f"*{dtype}"
    types = {"x": pointer, "keys": keys, "out": pointer, "factor": "fp32"}
    types |= dict.fromkeys(
        ("start", "threshold", "count", "width", "x_inner", "x_outer_stride", "x_inner_stride"), "i32"
    )
    constants = {"x_stride": 1, "FLAT": True, "ROWS": dropout.ROWS, "COLUMNS": dropout.COLUMNS}
    loose = frozenset({"start", "threshold", "count", "x_inner"})
    name = "keyed_dropout" if keys == "*i32" else "keyed_dropout[unhashed]"
    return Case(name, dropout.keyed_dropout_kernel, dtype, types, constants, dropout.WARPS, loose)


def _low_rank_cases(dtype: str, weight: str, each: int, shared: int = 1) -> list[Case]:
    """LoRA's kernels at one rank; the adapter's weights in ``weight``. Of ``shared`` layers that read one x only those
    that they share.
    """
    sizes = tiles(shared * each, 4096, TORCH_DTYPES[dtype], TORCH_DTYPES[weight])
    names = ("one", "two", "three")
    pointers = {
        **dict.fromkeys(("x", "grad", "grad_x", "result"), f"*{dtype}"),
        **dict.fromkeys(("b", *(f"a_{name}" for name in names)), f"*{weight}"),
        **dict.fromkeys(("down", "up", "grad_a", "grad_b", *(f"up_{name}" for name in names)), "*fp32"),
        "hashes": "*i32",
    }
    lines = ("x_row", "a_row", "y_row", "p_row", "b_row", "g_row", "part", "up_part", "b_part", "end_one", "end_two")
    types = pointers | dict.fromkeys(("start", "threshold", "count", "width", "rank", "steps", *lines), "i32")
    types["factor"] = "fp32"
    known: dict[str, object] = dict.fromkeys(("HAS_MASK", "HAS_X", "HAS_A", "HAS_UP", "HAS_B"), True)
    known |= dict.fromkeys(("x_column", "a_column", "p_column", "b_column", "g_column", "y_column"), 1)
    known |= {f"{matrix}_{name}": None for name in names[shared:] for matrix in ("a", "up")}
    known |= {"SHARED": shared, **(dict.fromkeys(("end_one", "end_two")) if shared == 1 else {})}
    cases: list[tuple[str, triton.JITFunction, int, int, int]] = [
        ("lora_down", low_rank_down.lora_down_kernel, down_rows(1456), sizes.walked, sizes.rank),
        ("lora_down_backward", low_rank_down.lora_down_backward_kernel, DOWN_BACK_ROWS, sizes.down, sizes.rank),
    ]
    if shared == 1:
        cases += [
            ("lora_up", low_rank.lora_up_kernel, UP_ROWS, UP_COLUMNS, UP_RANK),
            ("lora_up_backward", low_rank.lora_up_backward_kernel, up_back_rows(sizes.rank), sizes.up, sizes.rank),
        ]
    tag = (f"r{each}" if shared == 1 else f"{shared} x r{each}") + ("" if weight == dtype else f",{weight} adapter")
    found = []
    for name, kernel, tile_rows, columns, rank in cases:
        constants = {**known, "ROWS": tile_rows, "COLUMNS": columns, "RANK": rank}
        constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
        loose = frozenset({"start", "threshold", "count", "steps"})
        found.append(Case(f"{name}[{tag}]", kernel, dtype, types, constants, WARPS, loose))
    return found


def _sum_case(dtype: str) -> Case:
    types = {**dict.fromkeys(("parts_one", "parts_two", "out_one"), "*fp32"), "out_two": f"*{dtype}", "factor": "fp32"}
    names = ("count_one", "part_one", "size_one", "count_two", "part_two", "size_two")
    return Case(
        "lora_sum_parts",
        low_rank.sum_parts_kernel,
        dtype,
        {**types, **dict.fromkeys(names, "i32")},
        {"BLOCK": SUM_BLOCK},
        WARPS,
        frozenset({"count_one", "count_two", "size_one", "size_two"}),
    )


def _dequantize_case(dtype: str, nested: bool) -> Case:
    """Of bitsandbytes' blocks of 64 weights."""
    wide = dict.fromkeys(("table", "code", "outer", "offset", "levels"), "*fp32")
    types = {"packed": "*u8", **wide, **({"levels": "*u8"} if nested else {}), "out": f"*{dtype}", "count": "i32"}
    sizes: dict[str, object] = {"OUTER": nf4.OUTER_BLOCK, "HALF": 32, "BLOCKS": nf4.WEIGHTS // 64}
    if not nested:
        sizes |= dict.fromkeys(("code", "outer", "offset"))
    tag = "[two levels]" if nested else ""
    return Case(f"dequantize_nf4{tag}", nf4.dequantize_nf4_kernel, dtype, types, sizes, nf4.WARPS)


def _head_cases(dtype: str) -> list[Case]:
    grad, packed = f"*{dtype}", dtype != "fp32"
    numbers = dict.fromkeys(("vocabulary", "row_stride", "grad_stride"), "i32")
    numbers |= dict.fromkeys(("inverse_temperature", "softcap", "grad_factor"), "fp32")
    cases = []
    for cap in (False, True):
        tag = "[softcap]" if cap else ""
        kl_types = {"student": "*fp32", "teacher": "*fp32", "grad": grad, "losses": "*fp32", **numbers}
        constants = {"HAS_CAP": cap, "HAS_GRAD": True, "PACKED": packed, "BLOCK": kl.BLOCK}
        cases.append(Case(f"linear_kl_div{tag}", kl.kl_div_kernel, dtype, kl_types, constants, kl.WARPS))
        types = {"logits": "*fp32", "targets": "*i64", "out": "*fp32", "grad": grad, **numbers}
        constants = {"HAS_CAP": cap, "HAS_GRAD": True, "PACKED": packed, "BLOCK": log_prob.BLOCK}
        cases.append(Case(f"linear_log_prob{tag}", log_prob.log_prob_kernel, dtype, types, constants, log_prob.WARPS))
    return cases


def all_cases(dtypes: tuple[str, ...] = DTYPES) -> list[Case]:
    """Every kernel in the dtypes it is used with, at widths of a 7B or 8B model."""
    cases = []
    for dtype in dtypes:
        cases += [
            *_distance_cases(dtype),
            _add_rows_case(dtype),
            _gather_case(dtype),
            *_pairwise_cases(dtype),
            *_head_cases(dtype),
        ]
        cases += [_dropout_case(dtype, keys) for keys in ("*i32", "*i64")]
        cases += [case for ranks in LOW_RANKS[dtype] for case in _low_rank_cases(dtype, *ranks)]
        cases += [case for ranks in SHARED_RANKS[dtype] for case in _low_rank_cases(dtype, *ranks)]
        cases += [_sum_case(dtype), *(_dequantize_case(dtype, nested) for nested in (False, True))]
    return cases


def digest(case: Case) -> str:
    """Changes when the kernel, or a function or constant it may use, changes; a recorded row with another digest is
    stale.
    """
    functions = {
        n: v for n, v in sys.modules[case.kernel.fn.__module__].__dict__.items() if isinstance(v, triton.JITFunction)
    }
    text = "".join(functions[name].src for name in sorted(functions))
    modules = {sys.modules[function.fn.__module__] for function in functions.values()}
    constants = {
        n: v.value for module in modules for n, v in vars(module).items() if isinstance(v, triton.language.constexpr)
    }
    text += str(sorted(constants.items()))
    return hashlib.sha256(f"{text}{case.types}{case.constants}{case.warps}{case.registers or ''}".encode()).hexdigest()[
        :12
    ]


def compile_case(case: Case, sm: int) -> tuple[bytes, int]:
    """The cubin of one specialisation and its dynamic shared memory; pointers and sizes divide by 16 as a launch would
    find them.
    """
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = [
        n for n, kind in signature.items() if (kind.startswith("*") or kind == "i32") and n not in case.unaligned
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.warps, "maxnreg": case.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return compiled.asm["cubin"], compiled.metadata.shared


def resources(cubin: bytes, dynamic_shared: int) -> dict[str, int]:
    """Registers, shared and local bytes, and 128-bit (or wider) global loads of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, shared, local = map(int, found.groups())
    wide = len(re.findall(r"\b(?:LDG\.E|LDGSTS\.E)[\w.]*\.(?:128|256)", sass))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {
        "registers": registers,
        "shared_bytes": shared + dynamic_shared,
        "spill_bytes": stack + local + 4 * spills,
        "loads_128bit": wide,
    }


def row(case: Case, sm: int) -> dict[str, object]:
    """One row of the report."""
    used = resources(*compile_case(case, sm))
    return {"kernel": case.name, "dtype": case.dtype, "sm": sm, **used, "warps": case.warps, "digest": digest(case)}


def over_limit(entry: Mapping[str, object]) -> list[str]:
    """What a row exceeds, as text; empty where it keeps the limits."""
    limits = MATRIX_LIMITS if str(entry.get("kernel")).startswith(MATRIX_KERNELS) else LIMITS
    return [f"{key} {entry[key]} > {limit}" for key, limit in limits.items() if int(str(entry[key])) > limit]


def main() -> int:
    """Writes the report; 1 if a kernel exceeds a limit or reads narrow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"triton": None, "rows": []}
    # A row of the same kernel text, compiled by the same Triton, is what compiling again would give.
    current = {
        (r["kernel"], r["dtype"], r["sm"], r["digest"]): r
        for r in known["rows"]
        if known["triton"] == triton.__version__
    }
    wanted = [(case, sm) for case in all_cases() for sm in ARCHITECTURES]
    entries = [current.get((case.name, case.dtype, sm, digest(case))) or row(case, sm) for case, sm in wanted]
    report = {
        "created": datetime.now(UTC).date().isoformat(),
        "triton": triton.__version__,
        "limits": LIMITS,
        "matrix_limits": MATRIX_LIMITS,
        "rows": entries,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    head = json.dumps({**report, "rows": []}, indent=1)
    arguments.out.write_text(head.replace('"rows": []', f'"rows": [\n{lines}\n ]') + "\n")
    bad = [(entry, over_limit(entry)) for entry in entries if over_limit(entry) or not entry["loads_128bit"]]
    for entry, reasons in bad:
        print(entry["kernel"], entry["dtype"], f"sm_{entry['sm']}", *(reasons or ["no 128-bit load"]), sep="  ")
    print(f"{len(entries)} cubins, {len(bad)} outside the limits → {arguments.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
