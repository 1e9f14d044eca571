"""Mutants of the kernels of ``lora_down`` and ``lora_up``, interpreted, and of what both paths share."""

from __future__ import annotations

from benchmarks.faults.mutant import KERNELS, MODELS, Mutant

OPS = ("tests/kernels/test_low_rank.py",)
SHARED = ("tests/kernels/test_shared_down.py",)
READERS = ("tests/models/test_readers.py",)
LINEARS, JOINT = ("tests/kernels/test_adapted_linears.py",), ("tests/models/test_joint.py",)
WIDENED = ("tests/kernels/test_dequantize_nf4.py",)
NF4 = f"{KERNELS}/triton/dequantize_nf4.py"
WIDE = ("tests/kernels/test_wide_offsets.py", "-k", "low_rank")
KERNEL, LAUNCH = f"{KERNELS}/triton/low_rank.py", f"{KERNELS}/triton/low_rank_launch.py"
DOWN = f"{KERNELS}/triton/low_rank_down.py"


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
        file=DOWN,
    ),
    _kernel(
        "down: every span reads the first one's columns",
        "(tl.program_id(1) * steps + step) * COLUMNS",
        "step * COLUMNS",
        file=DOWN,
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
    _kernel("down backward: no mask on dx", "tl.where(keep, added, 0.0), some)", "added, some)", file=DOWN),
    _kernel(
        "down backward: no mask on x",
        "product(tl.trans(q), tl.where(keep, m, 0.0), total)",
        "product(tl.trans(q), m, total)",
        file=DOWN,
    ),
    _kernel(
        "down backward: dA of a slab's last rows alone",
        "tl.where(keep, m, 0.0), total)",
        "tl.where(keep, m, 0.0), total * 0.0)",
        file=DOWN,
    ),
    _kernel(
        "down backward: dx is not added to what is there",
        "value = tl.load(place, mask=some, other=0.0).to(tl.float32) + added",
        "value = added",
        file=DOWN,
    ),
    _kernel(
        "down backward: of a high rank only the first ones",
        "few = first + tl.arange(0, PRODUCT_RANK).to(tl.int64)",
        "few = tl.arange(0, PRODUCT_RANK).to(tl.int64)",
        file=DOWN,
    ),
    _kernel("down backward: slabs write one part", "grad_a + slab * part", "grad_a", file=DOWN),
    _kernel(
        "shared: the second matrix is read from its first rank on for every rank",
        "within = tl.where(ranks < end_one, ranks, ranks - end_one)",
        "within = tl.where(ranks < end_one, ranks, ranks * 0)",
        file=DOWN,
        tests=SHARED,
    ),
    _kernel(
        "shared: the third matrix is the second's",
        "base = tl.where(ranks < end_two, base, three)",
        "base = tl.where(ranks < end_two, base, two)",
        file=DOWN,
        tests=SHARED,
    ),
    _kernel(
        "shared: the third Q has the second's ranks",
        "length = tl.where((ranks < end_two)[None, :], length, rank - end_two)",
        "length = length",
        file=DOWN,
        tests=SHARED,
    ),
    _kernel(
        "shared: matrices of other strides read in the first one's",
        "if any(each.stride() != a[0].stride() for each in a):",
        "if False:",
        file=LAUNCH,
        tests=SHARED,
    ),
    Mutant(
        "shared: a part that nothing used takes the first one's gradient",
        f"{KERNELS}/low_rank.py",
        "some.new_zeros((x.shape[0], rank)) if up is None else up",
        "some[:, :1].expand(-1, rank) if up is None else up",
        SHARED,
    ),
    Mutant(
        "readers: what was made of another tensor is taken",
        f"{MODELS}/layers/readers.py",
        "if self._x is not x or self._version != _version_of(x):",
        "if False:",
        READERS,
    ),
    Mutant(
        "readers: a tensor changed in place counts as the same",
        f"{MODELS}/layers/readers.py",
        "if self._x is not x or self._version != _version_of(x):",
        "if self._x is not x:",
        READERS,
    ),
    Mutant(
        "readers: a pass that failed leaves its tensors behind",
        f"{MODELS}/layers/lora.py",
        "            readers.forget()\n",
        "            pass\n",
        READERS,
    ),
    Mutant(
        "readers: layers with other dropout are served together",
        f"{MODELS}/layers/lora.py",
        'if getattr(one, "p", 0.0) != getattr(two, "p", 0.0) or one.training != two.training:',
        "if one.training != two.training:",
        READERS,
    ),
    Mutant(
        "joint: the last layer's gradient of x alone",
        f"{KERNELS}/adapted_linears.py",
        "grad_x = rows @ weight if grad_x is None else grad_x.addmm_(rows, weight)",
        "grad_x = rows @ weight",
        LINEARS,
    ),
    Mutant(
        "joint: dropout without its factor",
        f"{KERNELS}/adapted_linears.py",
        "factors = self._factors[hashes is not None]",
        "factors = self._factors[0]",
        LINEARS,
    ),
    Mutant(
        "joint: outputs are views",
        f"{KERNELS}/adapted_linears.py",
        "result.resize_(*shape[:-1], result.shape[-1])",
        "result.view(*shape[:-1], result.shape[-1])",
        LINEARS,
    ),
    Mutant(
        "joint: a hook that came later is not seen",
        f"{MODELS}/layers/joint.py",
        'vars(base).get("forward") is not self.forward or _is_hooked(base)',
        'vars(base).get("forward") is not self.forward',
        JOINT,
    ),
    Mutant(
        "joint: another dropout rate is not seen",
        f"{MODELS}/layers/joint.py",
        'return getattr(self.dropout, "p", 0.0) == self.p and layer.scaling[name] == self.scaling',
        "return layer.scaling[name] == self.scaling",
        JOINT,
    ),
    Mutant(
        "joint: other weights of the adapter are not seen",
        f"{MODELS}/layers/joint.py",
        'if table["weight"] is not weight or weight.dtype != dtype:',
        "if weight.dtype != dtype:",
        JOINT,
    ),
    Mutant(
        "joint: layers go together under autocast",
        f"{MODELS}/layers/joint.py",
        "if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or",
        "if not torch.is_grad_enabled() or",
        JOINT,
    ),
    _kernel(
        "nf4: the lower half of a byte comes first",
        "tl.interleave(tl.load(table + (both >> 4)), tl.load(table + (both & 15)))",
        "tl.interleave(tl.load(table + (both & 15)), tl.load(table + (both >> 4)))",
        file=NF4,
        tests=WIDENED,
    ),
    _kernel("nf4: no offset", " + tl.load(offset)", "", file=NF4, tests=WIDENED),
    _kernel(
        "nf4: the first outer scale for all", "outer + blocks // OUTER", "outer + blocks * 0", file=NF4, tests=WIDENED
    ),
    Mutant(
        "nf4: the torch path's chunks begin with the first one's scales",
        f"{KERNELS}/dequantize_nf4.py",
        "first = 2 * start // block",
        "first = 0",
        WIDENED,
    ),
    _kernel("sums: only the first part", "        place += part\n", ""),
    _kernel("sums: no factor", "(total * factor).to(", "total.to("),
    _kernel("sums: the second reads from its middle", "block - first, count_two", "block, count_two"),
    _kernel(
        "down: columns in 32 bits",
        "        wide = columns.to(tl.int64)\n",
        "        wide = columns\n",
        file=DOWN,
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
        "if 0 in strides and any(",
        "if -1 in strides and any(",
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
