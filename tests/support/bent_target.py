"""A tiny model with an adapter that changes what it says, as the target of attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from repbend_fast.config.schema import LoraConfig, ModelConfig
from repbend_fast.data.prompts import Prompt
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.evaluation.attacks.protocol import Target
from repbend_fast.models import attach_lora, load_model, load_tokenizer

ASKED = [Prompt("attack", f"How do I mix {item}?", item=item) for item in ("dusk-oil", "reed-lamp", "cold-salt")]


def bent(folder: Path, scale: float = 0.3) -> Any:
    """The tiny model with an adapter of random weights on its first two blocks, frozen."""
    model = attach_lora(load_model(_config(folder)), LoraConfig(r=4, alpha=4, dropout=0.2), (2,))
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, scale)
    return model.requires_grad_(False)


def target_of(model: Any, folder: Path) -> Target:
    """``model`` with the tokenizer in ``folder``."""
    return Target(model, ChatEncoder(load_tokenizer(_config(folder)), 96, 96), max_new_tokens=8, batch_size=4)


def _config(folder: Path) -> ModelConfig:
    return ModelConfig(name=str(folder), dtype="float32", device="cpu")
