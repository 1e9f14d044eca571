"""Mutants of the kernels of ``lora_down`` and ``lora_up``, interpreted, and of what both paths share."""

from __future__ import annotations

from benchmarks.faults.mutant import KERNELS, Mutant

OPS = ("tests/kernels/test_low_rank.py",)
WIDE = ("tests/kernels/test_wide_offsets.py", "-k", "low_rank")
KERNEL, LAUNCH = f"{KERNELS}/triton/low_rank.py", f"{KERNELS}/triton/low_rank_launch.py"


def _kernel(name: str, old: str, new: str, *, file: str = KERNEL, tests: tuple[str, ...] = OPS) -> Mutant:
    return Mutant(f"low rank: {name}", file, old, new, tests, interpret=True)


LOW_RANK = [
    _kernel(
        "no middle part of a wide operand",
        "        middle, rest = cut(rest)\n",
        "        middle, rest = cut(rest)\n        middle = (rest * 0.0).to(tl.bfloat16)\n",
    ),
    _kernel(
        "no low part of a wide operand",
        "low, _ = cut(rest)",
        "low, _ = cut(rest * 0.0)",
    ),
    _kernel(
        "the low part of a wide left operand is not added",
        "            total = narrow_product(low, right, total)\n",
        "",
    ),
    Mutant(
        "low rank: products in plain tf32",
        KERNEL,
        'input_precision="tf32x3"',
        'input_precision="tf32"',
        OPS,
        interpret=True,
        unseen="the interpreter multiplies in float32 whatever the precision; a test on a GPU sees 2⁻¹¹",
    ),
    _kernel(
        "down: no mask",
        "            m = tl.where(kept(hashes, rows, known, columns, start, threshold), m, 0.0)\n",
        "            m = m\n",
    ),
    _kernel(
        "down: every span reads the first one's columns",
        "(tl.program_id(1) * steps + step) * COLUMNS",
        "step * COLUMNS",
    ),
    _kernel("down: spans are not added up", "        if spans > 1:\n", "        if spans > 99:\n", file=LAUNCH),
    _kernel("up: no factor", "+ factor * added", "+ added"),
    _kernel(
        "up: only the first ranks",
        "        ranks = (first + tl.arange(0, RANK)).to(tl.int64)",
        "        ranks = tl.arange(0, RANK).to(tl.int64)",
    ),
    _kernel("up backward: slabs write one part", "grad_b + slab * b_part", "grad_b"),
    _kernel("up backward: tiles write one part", "up + tile * up_part", "up"),
    _kernel(
        "up backward: dB of a slab's last rows alone",
        "product(tl.trans(g), p, total)",
        "product(tl.trans(g), p, total * 0.0)",
    ),
    _kernel("down backward: no mask on dx", "tl.where(keep, added, 0.0), some)", "added, some)"),
    _kernel(
        "down backward: no mask on x",
        "product(tl.trans(q), tl.where(keep, m, 0.0), total)",
        "product(tl.trans(q), m, total)",
    ),
    _kernel(
        "down backward: dA of a slab's last rows alone",
        "tl.where(keep, m, 0.0), total)",
        "tl.where(keep, m, 0.0), total * 0.0)",
    ),
    _kernel(
        "down backward: dx is not added to what is there",
        "value = tl.load(place, mask=some, other=0.0).to(tl.float32) + added",
        "value = added",
    ),
    _kernel(
        "down backward: of a high rank only the first ones",
        "few = first + tl.arange(0, PRODUCT_RANK).to(tl.int64)",
        "few = tl.arange(0, PRODUCT_RANK).to(tl.int64)",
    ),
    _kernel("down backward: slabs write one part", "grad_a + slab * part", "grad_a"),
    _kernel("sums: only the first part", "        place += part\n", ""),
    _kernel("sums: no factor", "(total * factor).to(", "total.to("),
    _kernel("sums: the second reads from its middle", "block - first, count_two", "block, count_two"),
    _kernel(
        "down: columns in 32 bits",
        "        wide = columns.to(tl.int64)\n        m = ",
        "        wide = columns\n        m = ",
        tests=WIDE,
    ),
    _kernel(
        "hashes with gaps read as if they had none",
        "down if hashes is None else hashes.contiguous()",
        "down if hashes is None else hashes",
        file=LAUNCH,
    ),
    _kernel(
        "rows that share memory are written to",
        "if any(stride == 0 and size > 1 for",
        "if any(stride == -1 and size > 1 for",
        file=LAUNCH,
    ),
    Mutant(
        "heads: a short tail is a chunk of its own",
        f"{KERNELS}/head.py",
        "        starts.pop()\n",
        "        pass\n",
        ("tests/kernels/test_head_layout.py", "-k", "tail"),
    ),
    Mutant(
        "heads: under autocast the weight stays wide",
        f"{KERNELS}/head.py",
        "return [operand.to(torch.get_autocast_dtype(device.type)) for operand in operands]",
        "return list(operands)",
        ("tests/kernels/test_unusual_arguments.py", "-k", "autocast"),
    ),
]
