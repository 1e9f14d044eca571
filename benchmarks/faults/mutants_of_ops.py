"""Mutants of the ops, plain and in Triton."""

from __future__ import annotations

from benchmarks.faults.mutant import KERNELS, Mutant

RACE = "a race between warps of a GPU: an interpreter runs them one after the other"
RACE_TEST = ("tests/kernels/test_gpu.py", "-k", "packing")

KL = ("tests/kernels/test_linear_kl_div.py",)
LOG_PROB = ("tests/kernels/test_linear_log_prob.py",)
TAP = ("tests/kernels/test_bend_tap.py",)
VIEWS = ("tests/kernels/test_unusual_arguments.py",)
TAP_ROWS = ("tests/kernels/test_tap_rows.py",)
DISTANCES = ("tests/kernels/test_bend_distance.py", *VIEWS)

HEADS = [
    Mutant(
        "kl: packed blocks over the first",
        f"{KERNELS}/triton/linear_kl_div.py",
        "grad + row * grad_stride + offsets",
        "grad + row * grad_stride + (columns if PACKED else offsets)",
        KL,
        interpret=True,
    ),
    Mutant(
        "log prob: packed blocks over the first",
        f"{KERNELS}/triton/linear_log_prob.py",
        "grad + row * grad_stride + offsets",
        "grad + row * grad_stride + (columns if PACKED else offsets)",
        LOG_PROB,
        interpret=True,
    ),
    Mutant(
        "heads: no barrier before packing",
        f"{KERNELS}/triton/parts.py",
        "        tl.debug_barrier()\n",
        "",
        RACE_TEST,
        unseen=RACE,
    ),
    Mutant(
        "log prob: no barrier behind the target's logit",
        f"{KERNELS}/triton/linear_log_prob.py",
        "        tl.debug_barrier()\n",
        "",
        RACE_TEST,
        unseen=RACE,
    ),
    Mutant(
        "kl: near 0 the difference of two rounded values",
        f"{KERNELS}/triton/linear_kl_div.py",
        "difference = tl.where(near, p * x + series, q - p)",
        "difference = q - p",
        KL,
        interpret=True,
        unseen="equal distributions differ only where a GPU fuses q - p with the products that made q and p",
    ),
    Mutant(
        "kl: the last block is not masked",
        f"{KERNELS}/triton/linear_kl_div.py",
        'lane_update(max_q, sum_q, tl.where(inside, z, float("-inf")))',
        "lane_update(max_q, sum_q, z)",
        KL,
        interpret=True,
    ),
    Mutant("kl: T² is missing", f"{KERNELS}/linear_kl_div.py", "losses.sum() * temperature**2", "losses.sum()", KL),
    Mutant(
        "heads: the loss's factor is rounded to 16 bits",
        f"{KERNELS}/rows.py",
        "torch.mul(flat[start:stop].to(factor.dtype), part, out=flat_out[start:stop])",
        "torch.mul(flat[start:stop].to(factor.dtype), part.to(out.dtype).to(factor.dtype), out=flat_out[start:stop])",
        (*KL, *LOG_PROB),
    ),
]

TAPS = [
    Mutant(
        "tap rows: nobody says where the rows lie",
        f"{KERNELS}/triton/tap_rows.py",
        "tl.store(place + n, i.to(tl.int32), mask=known & (tl.program_id(1) == 0))",
        "pass",
        TAP_ROWS,
        interpret=True,
    ),
    Mutant(
        "tap rows: only the first block of columns",
        f"{KERNELS}/triton/tap_rows.py",
        "columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "columns = tl.arange(0, BLOCK)",
        TAP_ROWS,
        interpret=True,
    ),
    Mutant(
        "tap rows: a row that is not there is zero",
        f"{KERNELS}/triton/tap_rows.py",
        'other=float("nan")',
        "other=0.0",
        TAP_ROWS,
        interpret=True,
    ),
    Mutant(
        "views: sequences counted as if they lay one behind the other",
        f"{KERNELS}/triton/parts.py",
        "start = tensor + (n // inner) * outer_stride + (n % inner) * inner_stride",
        "start = tensor + n * inner_stride",
        TAP_ROWS,
        interpret=True,
    ),
    Mutant(
        "tap: place is believed",
        f"{KERNELS}/triton/row_distance.py",
        "    selected = selected & (tl.load(rows + i, mask=selected, other=-1) == n)\n",
        "",
        VIEWS,
        interpret=True,
    ),
    Mutant(
        "tap forward: rows with gaps read as if they had none",
        f"{KERNELS}/triton/row_distance.py",
        "unused if rows is None else rows.contiguous()",
        "unused if rows is None else rows",
        VIEWS,
        interpret=True,
    ),
    Mutant(
        "tap backward: rows with gaps read as if they had none",
        f"{KERNELS}/triton/row_distance.py",
        "            rows.contiguous(),\n            place,",
        "            rows,\n            place,",
        VIEWS,
        interpret=True,
    ),
    Mutant(
        "dropout: keys with gaps read as if they had none",
        f"{KERNELS}/triton/keyed_dropout.py",
        "keys.contiguous()",
        "keys",
        VIEWS,
        interpret=True,
    ),
    Mutant(
        "tap: row numbers in 32 bits",
        f"{KERNELS}/triton/row_distance.py",
        "    i = tl.program_id(0).to(tl.int64)\n    n, known, keep",
        "    i = tl.program_id(0)\n    n, known, keep",
        ("tests/kernels/test_gpu.py", "-k", "offsets"),
        unseen="offsets pass 2³¹ only in tensors of several GiB, which a test on a GPU of 24 GiB makes",
    ),
    Mutant(
        "tap: cosines are not clamped (Triton)",
        f"{KERNELS}/triton/row_distance.py",
        "        cosine = tl.minimum(cosine, 1.0, propagate_nan=tl.PropagateNan.ALL)\n",
        "",
        DISTANCES,
        interpret=True,
    ),
    Mutant("tap: cosines are not clamped (torch)", f"{KERNELS}/row_distance.py", ".clamp_(-1, 1)", "", DISTANCES),
    Mutant(
        "tap: mse's gradient is half as large (Triton)",
        f"{KERNELS}/triton/row_distance.py",
        "a = 2.0 / width",
        "a = 1.0 / width",
        TAP,
        True,
    ),
    Mutant(
        "tap: mse's gradient is half as large (torch)",
        f"{KERNELS}/row_distance.py",
        "2 / h.shape[-1]",
        "1 / h.shape[-1]",
        TAP,
    ),
    Mutant(
        "tap: the loss's factor is rounded to 16 bits",
        f"{KERNELS}/triton/row_distance.py",
        "added *= tl.load(scale).to(tl.float32)",
        "added *= tl.load(scale).to(out.dtype.element_ty).to(tl.float32)",
        TAP,
        interpret=True,
    ),
    Mutant(
        "launch: on the current device, not the tensor's",
        f"{KERNELS}/launch.py",
        "    return torch.cuda.device(tensor.device)\n",
        "    return _NOTHING\n",
        ("tests/kernels/test_gpu.py",),
        unseen="only a machine with two GPUs has another current device",
    ),
]

FORWARD = ("tests/models/test_lora_forward.py",)

CONSUMED = ("tests/kernels/test_consumed_references.py",)
TRIPLETS = ("tests/kernels/test_triplet_tap.py",)
WIDE = ("tests/kernels/test_wide_offsets.py",)
SECOND = ("tests/kernels/test_situations.py", "-k", "create_graph")

LOOPS = [
    Mutant(
        "triplets: no way back through the mean",
        f"{KERNELS}/triplet_tap.py",
        "_pull(toward, weights, largest, center, inverse) / count)",
        "_pull(toward, weights, largest, center, inverse) * 0)",
        TRIPLETS,
    ),
    Mutant(
        "triplets: inactive rows have a gradient",
        f"{KERNELS}/triplet_tap.py",
        "active = value > 0",
        "active = value == value",
        TRIPLETS,
    ),
    Mutant(
        "triplets: the sums follow autocast",
        f"{KERNELS}/triplet_tap.py",
        "    values, units = [], []\n    with checks.in_own_dtypes(hidden.device):\n",
        "    values, units = [], []\n    if True:\n",
        TRIPLETS,
    ),
    Mutant(
        "tap: directions are read as references",
        f"{KERNELS}/bend_tap.py",
        '    consumed.check_references("reference_rows", reference_rows)\n',
        "",
        CONSUMED,
    ),
    Mutant(
        "tap: only the tensor itself is known to hold directions",
        f"{KERNELS}/consumed.py",
        "any(_overlap(_span(reference), span) for span in note.spans)",
        "_span(reference) in note.spans",
        CONSUMED,
    ),
    Mutant(
        "ops: a second derivative comes back detached",
        f"{KERNELS}/checks.py",
        "if torch.is_grad_enabled() and not torch.compiler.is_compiling():",
        "if torch.compiler.is_compiling():",
        SECOND,
    ),
    Mutant(
        "tap: columns in 32 bits",
        f"{KERNELS}/triton/row_distance.py",
        "value = tl.load(row + columns.to(tl.int64) * g_stride",
        "value = tl.load(row + columns * g_stride",
        WIDE,
        interpret=True,
    ),
    Mutant(
        "dropout: columns in 32 bits",
        f"{KERNELS}/triton/keyed_dropout.py",
        "columns.to(tl.int64)[None, :] * x_stride",
        "columns[None, :] * x_stride",
        WIDE,
        interpret=True,
    ),
    Mutant(
        "distances: a mask takes the place of the range check",
        f"{KERNELS}/triton/row_distance.py",
        "keep &= tl.load(mask + i) != 0",
        "keep = tl.load(mask + i) != 0",
        VIEWS,
        interpret=True,
    ),
    Mutant(
        "kl: a word at −inf on both sides (Triton)",
        f"{KERNELS}/triton/linear_kl_div.py",
        "difference - tl.where(p == 0.0, 0.0, p * x)",
        "difference - p * x",
        KL,
        interpret=True,
    ),
    Mutant(
        "log prob: an ignored target's value",
        f"{KERNELS}/linear_log_prob.py",
        "        out.masked_fill_(ignored, 0.0)\n",
        "",
        LOG_PROB,
    ),
    Mutant(
        "log prob: an ignored target's gradient",
        f"{KERNELS}/linear_log_prob.py",
        "            grad.masked_fill_(ignored[:, None], 0.0)\n",
        "            pass\n",
        LOG_PROB,
    ),
]
