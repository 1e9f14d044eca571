"""A tiny random Llama with a LoRA adapter, so that the examples run anywhere in seconds. Put your own model in its
place.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 128


def build() -> PeftModel:
    """Llama with 4 blocks of width 64, LoRA on attention and MLP."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(LlamaForCausalLM(config), lora)
    assert isinstance(model, PeftModel)
    return model


def batch(seed: int, sequences: int = 4, tokens: int = 16) -> tuple[Tensor, Tensor]:
    """Random token ids [B, T] and a bool mask of the real ones; each sequence is padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (sequences, tokens), generator=generator)
    lengths = torch.randint(tokens // 2, tokens + 1, (sequences,), generator=generator)
    return ids, torch.arange(tokens)[None] < lengths[:, None]
