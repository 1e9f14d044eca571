"""A transformers ``Trainer`` that adds a RepBend term to the language-model loss, through ``window_distance``.

    python examples/trainer_with_repbend_term.py

Each example carries a safe and an unsafe sequence. States of the safe one are kept where the model without its adapter
has them, states of the unsafe one are pushed away, over a window of layers. The tuples of ``output_hidden_states`` go
in as they come.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from repbend_kernels import window_distance
from tiny_model import batch, build
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

WINDOW = slice(2, 5)
SAFE_WEIGHT, UNSAFE_WEIGHT = 0.05, 0.05


class Pairs(Dataset):
    """Safe and unsafe token ids with their masks."""

    def __init__(self, count: int) -> None:
        (safe, safe_mask), (unsafe, unsafe_mask) = batch(1, count), batch(2, count)
        self.columns = {"safe_ids": safe, "safe_mask": safe_mask, "unsafe_ids": unsafe, "unsafe_mask": unsafe_mask}

    def __len__(self) -> int:
        return len(self.columns["safe_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


class RepBendTrainer(Trainer):
    """Loss = language modelling on safe + weight · distance on safe − weight · distance on unsafe."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """Both terms from one adapted and one reference pass per stream."""
        labels = inputs["safe_ids"].masked_fill(~inputs["safe_mask"], -100)
        outputs, safe = self.distance(model, inputs["safe_ids"], inputs["safe_mask"], labels)
        _, unsafe = self.distance(model, inputs["unsafe_ids"], inputs["unsafe_mask"], None)
        loss = outputs.loss + SAFE_WEIGHT * safe - UNSAFE_WEIGHT * unsafe
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def distance(model: Any, ids: Tensor, mask: Tensor, labels: Tensor | None) -> tuple[Any, Tensor]:
        """Mean distance over the window between the model with and without its adapter."""
        # Right padding changes no real token under causal attention, so neither pass needs the mask.
        with torch.no_grad(), model.disable_adapter():
            reference = model(ids, output_hidden_states=True).hidden_states
        outputs = model(ids, labels=labels, output_hidden_states=True)
        # The reference is not used again: its memory may become the gradient.
        distance = window_distance(outputs.hidden_states[WINDOW], reference[WINDOW], mask, consume_references=True)
        return outputs, distance


def main(steps: int = 12) -> list[float]:
    """Trains on the tiny model and returns the loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
        )
        trainer = RepBendTrainer(model=build(), args=arguments, train_dataset=Pairs(16))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(" ".join(f"{loss:.3f}" for loss in main()))
