"""What the project needs of a causal language model: transformers' own have it, and so has a peft model around one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import Cache, GenerationConfig


class Shape(Protocol):
    """A model's configuration. What only some families have is asked for with ``getattr``."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    tie_word_embeddings: bool
    use_cache: bool
    pad_token_id: int | None
    architectures: list[str] | None
    _name_or_path: str
    _attn_implementation: str | None

    def get_text_config(self) -> Shape:
        """The decoder's part; the configuration itself for a model of text alone."""

    def to_dict(self) -> dict[str, object]:
        """All settings as plain values."""


class ClassifierShape(Shape, Protocol):
    """The configuration of a sequence classifier."""

    id2label: Mapping[int, str]
    num_labels: int


class Output(Protocol):
    """What one pass gives. ``hidden_states`` are there where they were asked for, and so is the cache."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    past_key_values: Cache | None


class CausalLM(Protocol):
    """A causal LM of transformers, or a peft model around one, which passes on what it has not itself."""

    @property
    def config(self) -> Shape:
        """The configuration that it was made of."""

    generation_config: GenerationConfig
    name_or_path: str
    training: bool

    @property
    def device(self) -> torch.device:
        """Where its first parameter lives."""

    def __call__(self, **inputs: object) -> Output:
        """One pass."""

    def generate(self, **inputs: object) -> Tensor:
        """Token ids [B, T] of prompts and answers, as ``generation_config`` says."""

    def get_decoder(self) -> nn.Module:
        """The part that ends before the head."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of the token ids."""

    def get_output_embeddings(self) -> nn.Linear:
        """The head, as every family that can be bent has it."""

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Choose among transformers' implementations of attention."""

    def resize_token_embeddings(self, new_num_tokens: int, *, mean_resizing: bool = True) -> nn.Module:
        """Give the embedding and the head so many rows."""

    def save_pretrained(self, save_directory: str | PathLike[str], **arguments: object) -> None:
        """Write configuration and weights into a folder."""

    def modules(self) -> Iterator[nn.Module]:
        """Itself and every module below."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The same, by name."""

    def buffers(self) -> Iterator[Tensor]:
        """Every buffer once."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter once."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same, by name."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze every parameter, or the opposite."""

    def train(self, mode: bool = True) -> Self:
        """Training mode, or evaluation mode."""

    def eval(self) -> Self:
        """Evaluation mode."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""

    def to(self, device: torch.device) -> Self:
        """Move to a device, in place."""

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether transformers itself recomputes blocks in backward."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, object] | None = None) -> None:
        """Let transformers recompute blocks in backward."""

    def gradient_checkpointing_disable(self) -> None:
        """Take that back."""


class SequenceClassifier(Protocol):
    """A model of transformers with a classification head."""

    @property
    def config(self) -> ClassifierShape:
        """The configuration that it was made of."""

    @property
    def device(self) -> torch.device:
        """Where its first parameter lives."""

    def __call__(self, **inputs: object) -> Output:
        """One pass; ``logits`` are [B, labels]."""


class AdaptedLM(CausalLM, Protocol):
    """A peft model around a causal LM."""

    @property
    def peft_config(self) -> Mapping[str, object]:
        """The settings of its adapters by name."""

    def get_base_model(self) -> CausalLM:
        """The model inside, which has the adapter's layers in it."""

    def disable_adapter(self) -> AbstractContextManager[object]:
        """Inside of the context the adapter is off."""

    def merge_and_unload(self) -> CausalLM:
        """The model inside with the adapter's product added to its weights."""

    def unload(self) -> CausalLM:
        """The model inside without the adapter's layers."""
