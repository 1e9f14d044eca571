"""The mutants: faults put into the code one at a time, each with the tests that have to fail. ``mutants.py`` runs them.

A mutant is one change of text that changes what the code does. ``old`` occurs exactly once in its file; a test holds
the list to that.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in ``file``; ``tests`` are pytest's arguments.

    With ``interpret`` Triton's kernels run on the CPU. ``unseen`` says why no test on a machine without a GPU, or with
    one, can fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    interpret: bool = False
    unseen: str | None = None


KERNELS = "kernels/repbend_kernels"
MODELS = "repbend_fast/models"
RACE = "a race between warps of a GPU: an interpreter runs them one after the other"
RACE_TEST = ("tests/kernels/test_gpu.py", "-k", "packing")

KL = ("tests/kernels/test_linear_kl_div.py",)
LOG_PROB = ("tests/kernels/test_linear_log_prob.py",)
TAP = ("tests/kernels/test_bend_tap.py",)
VIEWS = ("tests/kernels/test_unusual_arguments.py",)
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
        "factor = tl.load(scale).to(tl.float32)",
        "factor = tl.load(scale).to(out.dtype.element_ty).to(tl.float32)",
        TAP,
        interpret=True,
    ),
    Mutant(
        "launch: on the current device, not the tensor's",
        f"{KERNELS}/launch.py",
        "return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()",
        "return nullcontext()",
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
        "    add_to_rows_(reference[rows[0].shape[0] :], pull)\n",
        "",
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

PRODUCTS = ("tests/models/test_lora_products.py",)
MODES = ("tests/models/test_lora_training_mode.py",)

LORA = [
    Mutant(
        "lora: no low parts of wide operands",
        f"{KERNELS}/wide_products.py",
        "return high, (wide - high).to(dtype)",
        "return high, high * 0",
        PRODUCTS,
    ),
    Mutant(
        "lora: the low part of a product is not added",
        f"{KERNELS}/wide_products.py",
        "return both[:, : right.shape[1]] + both[:, right.shape[1] :]",
        "return both[:, : right.shape[1]].clone()",
        PRODUCTS,
    ),
    Mutant(
        "lora: of a low-rank product the left low part is lost",
        f"{KERNELS}/wide_products.py",
        "(left_high, left_high, left_low)",
        "(left_high, left_high, left_low * 0)",
        PRODUCTS,
    ),
    Mutant(
        "lora: of a low-rank product the right low part is lost",
        f"{KERNELS}/wide_products.py",
        "(right_high, right_low, right_high)",
        "(right_high, right_low * 0, right_high)",
        PRODUCTS,
    ),
    Mutant(
        "lora: products in parts without their factor",
        f"{KERNELS}/wide_products.py",
        "right, out.dtype), alpha=factor)",
        "right, out.dtype))",
        PRODUCTS,
    ),
    Mutant(
        "lora: the gradient of B without its factor",
        f"{KERNELS}/low_rank.py",
        "grad_b.mul_(factor)",
        "grad_b",
        PRODUCTS,
    ),
    Mutant(
        "lora: all layers share a mask",
        f"{MODELS}/layers/lora.py",
        'changes.entry(vars(layer), "place", place)',
        'changes.entry(vars(layer), "place", 0)',
        FORWARD,
    ),
    Mutant(
        "lora: no mask on the gradient of x",
        f"{KERNELS}/low_rank.py",
        "kept = self.read(start, stop, inner)",
        "kept = self.read(start, stop)",
        FORWARD,
    ),
    Mutant(
        "lora: no dropout without keys",
        f"{MODELS}/layers/lora.py",
        "if not (self.training and module.training):",
        "if True:",
        MODES,
    ),
    Mutant(
        "lora: dropout without keys in evaluation mode",
        f"{MODELS}/layers/lora.py",
        "if not (self.training and module.training):",
        "if not module:",
        MODES,
    ),
    Mutant(
        "lora: a dropout module that is off drops",
        f"{MODELS}/layers/lora.py",
        "self.training and module.training",
        "self.training",
        MODES,
    ),
    Mutant(
        "lora: without keys all rows share a mask",
        f"{MODELS}/layers/lora.py",
        "torch.randint(-(2**31), 2**31, x.shape[:1], dtype=torch.int32, device=x.device)",
        "torch.randint(-(2**31), 2**31, (1,), dtype=torch.int32, device=x.device).repeat(x.shape[0])",
        MODES,
    ),
    Mutant(
        "lora: without keys every call draws the same mask",
        f"{MODELS}/layers/lora.py",
        "torch.randint(-(2**31), 2**31, x.shape[:1], dtype=torch.int32, device=x.device)",
        "torch.arange(x.shape[0], dtype=torch.int32, device=x.device) * 977",
        MODES,
    ),
    Mutant(
        "lora: what is kept is not scaled up",
        f"{MODELS}/layers/lora.py",
        "layer.scaling[name] / (1 - p) if hashes",
        "layer.scaling[name] if hashes",
        MODES,
    ),
    Mutant(
        "lora: keys of None leave the mode to decide",
        f"{MODELS}/layers/lora.py",
        "row_hashes(keys.reshape(-1)), True",
        "row_hashes(keys.reshape(-1)), keys is not None",
        MODES,
    ),
    Mutant(
        "lora: the mode never decides again",
        f"{MODELS}/layers/lora.py",
        "shared.rows, shared.given = previous",
        "shared.rows = previous[0]",
        MODES,
    ),
]

SEEDS = ("tests/training/test_dropout_seeds.py",)
ORDER = ("tests/models/test_offload_order.py",)
OFFLOAD = "repbend_fast/models/layers/offload.py"
SEED_LINE = "dropout_seed(settings.seed, self.step, micro_batch)"

STEP = [
    Mutant(
        "trainer: every micro-batch has the same masks",
        "repbend_fast/training/trainer.py",
        SEED_LINE,
        "dropout_seed(settings.seed, self.step, 0)",
        SEEDS,
    ),
    Mutant(
        "trainer: every step has the same masks",
        "repbend_fast/training/trainer.py",
        SEED_LINE,
        "dropout_seed(settings.seed, 0, micro_batch)",
        SEEDS,
    ),
    Mutant(
        "offload: the way out does not wait for the state", OFFLOAD, "        stream.wait_stream(current)\n", "", ORDER
    ),
    Mutant(
        "offload: the way back does not wait for its memory",
        OFFLOAD,
        "        stream.wait_stream(torch.cuda.current_stream(self.device))\n",
        "",
        ORDER,
    ),
    Mutant(
        "offload: a state is read before it arrives",
        OFFLOAD,
        "        if kept.arrived is not None:\n            "
        "torch.cuda.current_stream(self.device).wait_event(kept.arrived)\n        return",
        "        return",
        ORDER,
    ),
    Mutant(
        "offload: memory is given back before it is copied",
        OFFLOAD,
        "        _, event = self._under_way.popleft()\n        "
        "torch.cuda.current_stream(self.device).wait_event(event)\n",
        "        self._under_way.popleft()\n",
        ORDER,
    ),
    Mutant("offload: states lie in pageable memory", OFFLOAD, "pin_memory=self._streams", "pin_memory=False", ORDER),
    Mutant(
        "pieces: host tensors lie in pageable memory",
        "repbend_fast/step/pieces.py",
        "tensor.pin_memory().to(device, non_blocking=True)",
        "tensor.to(device, non_blocking=True)",
        ("tests/step/test_host_syncs.py",),
        unseen="the host waits for the GPU, and no number changes",
    ),
    Mutant(
        "reference: switches stay off after an error",
        f"{MODELS}/layers/switches.py",
        "    try:\n        with torch.no_grad():\n            yield\n    finally:\n        for",
        "    with torch.no_grad():\n        yield\n    if True:\n        for",
        ("tests/models/test_attach_lora.py",),
    ),
    Mutant(
        "norm: eps is missing",
        f"{KERNELS}/rms_norm.py",
        "keepdim=True) + eps)",
        "keepdim=True))",
        ("tests/models/test_lean_layers.py",),
    ),
    Mutant(
        "recompute: an origin is never given up",
        f"{MODELS}/layers/recompute.py",
        "        if self._left == 0:\n            self._made = None\n",
        "",
        ("tests/models/test_lean_layers.py", "-k", "given_up"),
    ),
    Mutant(
        "load: cuDNN's attention stays on",
        "repbend_fast/models/load.py",
        "torch.backends.cuda.enable_cudnn_sdp(False)",
        "torch.backends.cuda.enable_cudnn_sdp(True)",
        ("tests/models/test_load_model.py", "-k", "settled"),
    ),
    Mutant(
        "keys: the sequences of a stream share masks",
        "repbend_fast/step/pieces.py",
        "index * 2**32 + within",
        "index * 0 + within",
        ("tests/step/test_levers.py", "tests/step/test_step_gradient.py"),
    ),
]

PROOFS = ("tests/step/test_proof.py",)

PROOF = [
    Mutant(
        "proof: a leak between packed sequences goes on",
        "repbend_fast/step/proof.py",
        '            self.proof.packing = "off"\n',
        "",
        PROOFS,
    ),
    Mutant(
        "proof: a head that is off by a scale passes",
        "repbend_fast/step/proof.py",
        "error <= error_bound and abs(scale - 1) <= scale_bound",
        "error <= 0.02 and abs(scale - 1) <= 0.02",
        PROOFS,
    ),
    Mutant(
        "first batch: a distance that is not 0 passes",
        "repbend_fast/step/zero_start.py",
        "if not abs(float(value)) <= bound:",
        "if not abs(float(value)) <= bound + 1e-3:",
        ("tests/training/test_model_proof.py",),
    ),
    Mutant(
        "step's denominators: one of a term without rows counts",
        "repbend_fast/objectives/normalize.py",
        "part.denominator if part.divides else 0",
        "part.denominator",
        ("tests/objectives/test_normalize_step.py",),
    ),
    Mutant(
        "units: the unit is left out of the gradient",
        "repbend_fast/step/terms/distance.py",
        "term.weight / term.denominator / unit",
        "term.weight / term.denominator",
        ("tests/objectives/test_distance_unit.py",),
    ),
]

STREAMS = ("tests/objectives/test_repbend_streams.py",)

OBJECTIVES = [
    Mutant(
        "repbend: rows do not count in the denominator",
        "repbend_fast/objectives/repbend.py",
        "max(1, rows_in(spans) * counted)",
        "max(1, counted)",
        STREAMS,
    ),
    Mutant(
        "repbend: the embeddings' layer is not counted",
        "repbend_fast/objectives/repbend.py",
        "len(layers) + every",
        "len(layers)",
        STREAMS,
    ),
    Mutant(
        "answers: targets are the rows' own tokens",
        "repbend_fast/step/terms/answer_loss.py",
        "reshape(-1)[self.rows + 1]",
        "reshape(-1)[self.rows]",
        ("tests/objectives/test_objective_gradients.py",),
    ),
]

MUTANTS = [*HEADS, *TAPS, *LOOPS, *LORA, *STEP, *PROOF, *OBJECTIVES]
