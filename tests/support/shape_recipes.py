"""Recipes of small models that are nothing but a configuration file: the planner needs no weights."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig

from repbend_fast.config import Config, load_config

LONGEST = 64
"""Most tokens of a prompt, and of an answer."""


def recipe(folder: Path, *overrides: str, layers: int = 8, hidden: int = 128, vocabulary: int = 1000) -> Config:
    """The published objective on a random Llama of ``layers`` blocks, window near the end, two examples a batch,
    float32.
    """
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    shape.save_pretrained(str(folder))
    settings = [
        f"model.name={folder}",
        "model.dtype=float32",
        "model.device=cpu",
        f"objective.window_start={layers - 3}",
        "objective.window_size=2",
        f"data.max_prompt_tokens={LONGEST}",
        f"data.max_answer_tokens={LONGEST}",
        "training.examples=2",
        "memory.checkpoint_blocks=auto",
    ]
    chosen = dict(setting.split("=", 1) for setting in (*settings, *overrides))
    return load_config("mistral-7b-instruct-v0.2", [f"{key}={value}" for key, value in chosen.items()])
