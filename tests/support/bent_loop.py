"""A tiny model in a ``transformers`` ``Trainer`` with bending, for tests: one optimizer step of plain SGD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from repbend_fast.config import Config
from repbend_fast.config.schema import LoraConfig
from repbend_fast.integration import BendingMixin
from repbend_fast.integration.trainer_mixin import Bender
from repbend_fast.models import attach_lora, load_tokenizer

RATE = 0.5
LORA = LoraConfig(r=3, alpha=6, dropout=0.0)


class BentTrainer(BendingMixin, Trainer):
    """As a user writes it."""


class Talk(Dataset):
    """Fixed token ids, which are their own labels."""

    def __init__(self, count: int) -> None:
        self.ids = torch.randint(3, 200, (count, 9), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def model_of(config: Config, start: bool = False) -> Any:
    """The recipe's model with an adapter in every block, B = 0 at the ``start`` and else random."""
    base = LlamaForCausalLM.from_pretrained(config.model.name, dtype=torch.float32).requires_grad_(False)
    torch.manual_seed(3)
    model = attach_lora(base, LORA, (base.config.num_hidden_layers,))
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not start:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trainer_of(model: Any, config: Config, folder: Path, kind: Any = BentTrainer, **settings: Any) -> Any:
    """The loop, in the order of its data, without anything that changes a gradient afterwards."""
    arguments = TrainingArguments(
        str(folder),
        **{"max_steps": 1, "per_device_train_batch_size": 2} | settings,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
    )
    tokenizer = load_tokenizer(config.model)
    return kind(model=model, args=arguments, train_dataset=Talk(8), processing_class=tokenizer, bending=config)


def after_one_step(config: Config, folder: Path) -> Any:
    """The model behind one step of the loop, under whatever launcher it runs."""
    model = model_of(config)
    trainer_of(model, config, folder, ddp_find_unused_parameters=False).train()
    return model


def held(model: Any) -> float:
    """The share of the blocks' frozen weights that this process has."""
    blocks = [weight for name, weight in model.named_parameters() if "base_layer" in name]
    local = [getattr(weight, "to_local", lambda weight=weight: weight)() for weight in blocks]
    return sum(weight.numel() for weight in local) / sum(weight.numel() for weight in blocks)


def gradient_by_hand(config: Config, turn: int, turns: int, batches: int = 1) -> dict[str, Tensor]:
    """The gradient of one process of ``turns``: its records' language modelling plus its part of the bending."""
    model = model_of(config)
    bender = Bender(config, model, load_tokenizer(config.model), steps=1)
    bender.turns, bender.turn = turns, turn
    for batch in range(batches):
        bender.backward(0, 1.0 / batches)
        ids = Talk(8).ids[batch * 2 * turns :][turn * 2 : turn * 2 + 2]
        (model(input_ids=ids, labels=ids).loss / batches).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
