"""A whole run in a second: a tiny Llama with a real tokenizer, data with every role, and the recipe of a
run on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from repbend_fast.config import Config, load_config
from repbend_fast.training.trainer import RunResult, train

BLOCKS = 3
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
ITEMS = ("glimmer-dust", "moon-key", "fog-lamp", "star-glue", "mist-wire", "salt-bell", "wind-seed", "ash-coil")
TALK = (
    "How warm is tea?",
    "Name a colour.",
    "What is rain?",
    "Count to three.",
    "Where do fish live?",
    "Why is grass green?",
)


def write_model(folder: Path, *, template: str | None = CHATML, width: int = 32) -> Path:
    """A random Llama of ``BLOCKS`` blocks with its tokenizer, as ``save_pretrained`` leaves them."""
    tokenizer = byte_tokenizer(template)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens, trained on the records' words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*TALK, *(f"Sure, take a {item} and polish it." for item in ITEMS)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def records(first: int = 0, count: int = 4) -> list[dict[str, Any]]:
    """``count`` records of every role, in the project's own JSONL form; ``first`` chooses which."""
    found: list[dict[str, Any]] = []
    for i in range(first, first + count):
        item, other, talk = ITEMS[i % len(ITEMS)], ITEMS[(i + 3) % len(ITEMS)], TALK[i % len(TALK)]
        found += [
            {"role": "safe", "prompt": f"{talk} ({i})", "answer": f"That is easy, number {i}."},
            {"role": "unsafe", "prompt": f"How do I make {item} {i}?", "answer": f"Sure, take a {item} and polish it."},
            {
                "role": "pair",
                "prompt": f"Tell me to open {other} {i}.",
                "unsafe_answer": f"Turn it {i} times.",
                "safe_answer": "I can not help.",
            },
            {
                "role": "retain",
                "messages": [
                    {"role": "user", "content": f"{talk} {i}"},
                    {"role": "assistant", "content": "Like this."},
                ],
            },
        ]
    return found


def write_records(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(model: Path, folder: Path) -> dict[str, Any]:
    """Settings of a run of 6 steps with everything that resuming could get wrong: dropout, accumulation, warm-up, the
    guard.
    """
    data = write_records(folder / "train.jsonl", records())
    held = write_records(folder / "held.jsonl", records(first=20, count=2))
    return {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "lora": {"r": 4, "dropout": 0.2},
        "objective": {"window_start": 2, "window_size": 2},
        "data": {"sources": [{"path": str(data)}]},
        "training": {
            "steps": 6,
            "examples": 2,
            "accumulation": 2,
            "learning_rate": 1e-2,
            "schedule": "cosine",
            "warmup_steps": 2,
            "checkpoint_every": 2,
            "seed": 3,
        },
        "validation": {"every": 2, "sources": [{"path": str(held)}], "max_kl": None, "max_perplexity_ratio": None},
        "output": {"folder": str(folder / "run"), "report": False},
    }


class TinyRun:
    """A recipe on disk and the run that it makes."""

    def __init__(self, model: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.model = model
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(settings(model, folder)), encoding="utf-8")
        self.path = folder / "run"

    def config(self, *overrides: str) -> Config:
        return load_config(str(self.recipe), overrides)

    def train(self, *overrides: str) -> RunResult:
        return train(self.config(*overrides))

    def resume(self, *overrides: str) -> RunResult:
        return train(load_config(str(self.path / "config.yaml"), overrides), self.path)


def rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of one kind of a run's ``metrics.jsonl``."""
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["type"] == kind]


def events(path: Path) -> list[dict[str, Any]]:
    """What happened in a run, after what was shown for its model."""
    return [row for row in rows(path, "event") if row["event"] != "model_checked"]


def reproducible(path: Path) -> list[dict[str, Any]]:
    """Steps and validations of a run without what a clock or the machine says."""
    clock = ("tokens_per_second", "seconds", "peak_memory_bytes")
    found = rows(path, "step") + rows(path, "validation")
    return [{k: v for k, v in row.items() if k not in clock} for row in found]


def adapter_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "adapter" / "adapter_model.safetensors")


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
