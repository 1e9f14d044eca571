"""Tiny random models of each family, built in code, and token batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from repbend_fast.config.schema import LoraConfig, MemoryConfig
from repbend_fast.data.records import Batch, PairSequence, Sequence
from repbend_fast.models import attach_lora, find_decoder, prepared
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.step import StreamResult, StreamRunner
from repbend_fast.step.levers import Levers, levers_of

BLOCKS = 4
VOCABULARY = 89
WINDOW = (2, 3)
LAYOUTS = ("off", "on")
WITHOUT_DROPOUT = LoraConfig(r=3, alpha=6, dropout=0.0)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    # Multiples of 64, which NF4 on the CPU needs.
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Wide weights keep every layer's states and their differences well above rounding.
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADED = _COMMON | {"head_dim": 16}


def _config(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**settings)


_MIXED = ["sliding_attention", "full_attention"] * (BLOCKS // 2)
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _config("LlamaConfig", **_COMMON),
    "mistral": _config("MistralConfig", **_HEADED, sliding_window=5),
    "qwen2": _config("Qwen2Config", **_COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": _config("Qwen3Config", **_HEADED, tie_word_embeddings=True),
    "gemma2": _config(
        "Gemma2Config", **_HEADED, sliding_window=5, query_pre_attn_scalar=16, final_logit_softcapping=3.0
    ),
    "gemma3": _config("Gemma3TextConfig", **_HEADED, sliding_window=5, query_pre_attn_scalar=16, layer_types=_MIXED),
    "phi3": _config("Phi3Config", **_COMMON, sliding_window=5),
}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A frozen random causal LM in eval mode. Norm weights are moved off 1 and biases off 0, so that dropping one
    shows.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.0 if "bias" in name or "gemma" in family else 1.0, std=0.2)
    model.to(dtype).requires_grad_(False).eval()
    return model


def adapted_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    lora: LoraConfig = WITHOUT_DROPOUT,
    window: tuple[int, ...] = WINDOW,
    trained: bool = True,
) -> Any:
    """A tiny model with LoRA; ``trained`` gives B random values, else it is 0 as at the start. Float64 adapters follow
    the model.
    """
    return wrap(tiny_model(family, dtype), lora=lora, window=window, trained=trained)


def wrap(
    base: Any, *, lora: LoraConfig = WITHOUT_DROPOUT, window: tuple[int, ...] = WINDOW, trained: bool = True
) -> Any:
    """LoRA around ``base``."""
    torch.manual_seed(7)
    model = attach_lora(base, lora, window)
    if next(base.parameters()).dtype == torch.float64:
        model.double()
    if trained:
        generator = torch.Generator().manual_seed(11)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def sequence(prompt: int, answer: int, seed: int) -> Sequence:
    """Random ids behind BOS (id 1)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (prompt + answer - 1,), generator=generator).tolist()
    return Sequence((1, *ids), prompt)


def pair(prompt: int, unsafe: int, safe: int, seed: int) -> PairSequence:
    """Two answers to one prompt."""
    first, second = sequence(prompt, unsafe, seed), sequence(prompt, safe, seed + 500)
    return PairSequence(first, Sequence((*first.ids[:prompt], *second.ids[prompt:]), prompt))


def ragged_batch() -> Batch:
    """Two examples per role, all of different lengths, longer than the sliding windows."""
    return Batch(
        safe=(sequence(5, 4, 1), sequence(7, 3, 2)),
        unsafe=(sequence(4, 7, 3), sequence(9, 5, 4)),
        pairs=(pair(6, 5, 8, 5), pair(3, 6, 2, 6)),
        retain=(Sequence(sequence(12, 0, 7).ids, 0), Sequence(sequence(6, 0, 8).ids, 0)),
    )


def objective_config(**settings: Any) -> RepBendConfig:
    """RepBend with the tests' window; every term on but the pair term."""
    return RepBendConfig(**({"window_start": WINDOW[0], "window_size": len(WINDOW)} | settings))


def gradients(model: Any) -> dict[str, Tensor]:
    """Copies of the adapter's gradients by name; zeros where there is none."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}


def runner_on(model: Any, levers: Levers, **settings: Any) -> StreamRunner:
    """A runner on ``model``, which is prepared for it and stays so."""
    return StreamRunner(prepared(model, levers), levers, **settings)


def run_step(
    model: Any,
    config: RepBendConfig,
    batch: Batch | None = None,
    memory: MemoryConfig | None = None,
    only: str | None = None,
    seed: int = 0,
) -> tuple[dict[str, StreamResult], dict[str, Tensor]]:
    """One step's results by stream, and the gradients it leaves; ``only`` runs one stream."""
    model.zero_grad(set_to_none=True)
    objective = build_objective(config, find_decoder(model).num_blocks)
    runner = runner_on(model, levers_of(memory or MemoryConfig(), model), uses_head=objective.uses_head)
    streams = [s for s in objective.streams(batch or ragged_batch(), 0) if only in (None, s.name)]
    results = {stream.name: runner.backward(stream, dropout_seed=seed) for stream in streams}
    return results, gradients(model)


def flat(gradient: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector, in the order of their names."""
    return torch.cat([gradient[name].flatten().double() for name in sorted(gradient)])
