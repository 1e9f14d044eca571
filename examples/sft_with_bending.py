"""TRL's ``SFTTrainer`` on conversations of your own, with a recipe's objective beside its loss.

    pip install trl
    python examples/sft_with_bending.py [RECIPE [key=value …]]

Model, LoRA and records are the recipe's; optimizer, steps and conversations are the loop's. ``accelerate launch`` or
``torchrun`` in front of it makes it several processes with ``DistributedDataParallel``.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import LoraConfig

from repbend_fast import load_config
from repbend_fast.errors import UserError
from repbend_fast.integration import BendingMixin
from repbend_fast.models import load_model, load_tokenizer

CHATS = (
    ("How warm is tea?", "As warm as you like it, and cooler after a while."),
    ("Name a colour.", "Blue."),
    ("What is rain?", "Water that falls out of clouds."),
    ("Where do fish live?", "In rivers, lakes and seas."),
)


def trl() -> Any:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("trl")
    except ImportError as error:
        raise UserError(f"this example needs TRL ({error}); pip install trl") from error


def main(recipe: str = "demo", overrides: Sequence[str] = (), steps: int = 4) -> list[dict[str, float]]:
    """Trains; returns what was logged of each step, its bending terms as ``bend_NAME``."""
    library = trl()

    class Bent(BendingMixin, library.SFTTrainer):
        """Both losses in one step."""

    config = load_config(recipe, overrides)
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=0.0,
        target_modules="all-linear" if config.lora.target_modules == "auto" else config.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    talk = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS]
    with tempfile.TemporaryDirectory() as folder:
        arguments = library.SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=config.training.learning_rate,
            max_length=256,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=config.model.device == "cpu",
            bf16=config.model.dtype == "bfloat16",
        )
        trainer = Bent(
            model=load_model(config.model),
            args=arguments,
            train_dataset=Dataset.from_dict({"messages": talk}),
            processing_class=load_tokenizer(config.model),
            peft_config=lora,
            bending=config,
        )
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    try:
        for row in main(*sys.argv[1:2], overrides=sys.argv[2:]):
            print(" ".join(f"{name} {value:.4g}" for name, value in row.items() if "loss" in name or "bend" in name))
    except UserError as error:
        sys.exit(f"error: {error}")
