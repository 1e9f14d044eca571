"""Mutants of the trainer: the layers that a step puts in, the step itself, its proof, and the objectives."""

from __future__ import annotations

from benchmarks.faults.mutant import KERNELS, MODELS, Mutant

FORWARD = ("tests/models/test_lora_forward.py",)

PRODUCTS = ("tests/kernels/test_low_rank.py",)
MODES = ("tests/models/test_lora_training_mode.py",)

LORA = [
    Mutant(
        "lora: the gradient of B without its factor",
        f"{KERNELS}/low_rank_chunks.py",
        "grad_b.mul_(factor)",
        "grad_b",
        PRODUCTS,
    ),
    Mutant(
        "lora: all layers share a mask",
        f"{MODELS}/layers/lora.py",
        'changes.entry(vars(layer), "place", places[group[0]] if readers else places[name])',
        'changes.entry(vars(layer), "place", 0)',
        FORWARD,
    ),
    Mutant(
        "lora: no mask on the gradient of x",
        f"{KERNELS}/low_rank_chunks.py",
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
        "float(layer.scaling[name] / kept)",
        "float(layer.scaling[name])",
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
        f"{MODELS}/layers/packing.py",
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
        "m * 2**32 + position",
        "m * 0 + position",
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
        "proof: adapted layers that nothing calls go unnamed",
        "repbend_fast/step/proof.py",
        "for name, was in called.items() if not was",
        "for name, was in called.items() if was is None",
        PROOFS,
    ),
    Mutant(
        "targets: a router that gives a tuple counts as linear",
        f"{MODELS}/coverage.py",
        "return isinstance(result, torch.Tensor) and result.shape == (3, outputs)",
        "return True",
        ("tests/models/test_coverage.py",),
    ),
    Mutant(
        "targets: a run's settings keep the word auto",
        "repbend_fast/training/trainer.py",
        'config.model_copy(update={"lora": settled_lora(base, config.lora)})',
        "config",
        ("tests/training/test_lora_targets.py",),
    ),
    Mutant(
        "rounding: transposed weights are seen as they lie",
        f"{MODELS}/layers/rounded.py",
        "weight.T if isinstance(linear, Conv1D) else weight",
        "weight",
        ("tests/models/test_transposed_layers.py",),
    ),
    Mutant(
        "head: the scale is left out of the KL",
        "repbend_fast/step/terms/head_kl.py",
        "head.inputs(reference)",
        "reference",
        ("tests/models/test_scaled_heads.py",),
    ),
    Mutant(
        "decoder: any of several lists is taken for the blocks",
        f"{MODELS}/decoder.py",
        "if len(blocks) == 1:",
        "if blocks:",
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
        "repbend_fast/objectives/rows.py",
        "max(1, rows_in(spans) * len(layers))",
        "max(1, len(layers))",
        STREAMS,
    ),
    Mutant(
        "repbend: the embeddings' layer is not counted",
        "repbend_fast/objectives/rows.py",
        "max(1, rows_in(spans) * len(layers))",
        "max(1, rows_in(spans) * len([x for x in layers if x]))",
        STREAMS,
    ),
    Mutant(
        "turns: a cut prompt keeps the places of the whole",
        "repbend_fast/data/turns.py",
        "p if p <= front else max(front, p - removed)",
        "p",
        ("tests/data/test_turns.py",),
    ),
    Mutant(
        "turns: rows of the first range alone are read",
        "repbend_fast/step/pieces.py",
        "in ranges_of(spans[member])",
        "in [spans[member][:2]]",
        ("tests/step/test_pieces.py",),
    ),
    Mutant(
        "rounded passes: the low-rank part counts twice",
        "repbend_fast/models/layers/rounded_passes.py",
        "(merged if found is None else found).sub_(low_rank)",
        "merged if found is None else found",
        ("tests/models/test_rounded_passes.py",),
    ),
    Mutant(
        "rounded passes: the reference is not rounded",
        "repbend_fast/models/layers/rounded_passes.py",
        "found = rounding(weight.contiguous(), place)",
        "found = None",
        ("tests/models/test_rounded_passes.py",),
    ),
    Mutant(
        "answers: targets are the rows' own tokens",
        "repbend_fast/step/terms/answer_loss.py",
        "reshape(-1)[self.rows + 1]",
        "reshape(-1)[self.rows]",
        ("tests/objectives/test_objective_gradients.py",),
    ),
]
