"""Bending in the loop of a ``transformers`` ``Trainer``: its gradient, what it refuses, and the model given back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bent_loop import RATE, BentTrainer, after_one_step, gradient_by_hand, model_of, trainer_of
from kernel_compare import assert_matches
from tiny_run import TinyRun
from torch import Tensor

from benchmarks.measure import peak_bytes
from benchmarks.memory import loop_memory
from repbend_fast.errors import UserError
from repbend_fast.integration.trainer_mixin import Bender
from repbend_fast.models import load_tokenizer
from repbend_fast.training.checkpoint import adapter_weights


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten() for name in sorted(values)])


def shape_of(model: Any) -> dict[str, object]:
    """The class of every module of the blocks, and what it has of its own."""
    modules = model.get_base_model().named_modules()
    return {name: (type(module), sorted(vars(module))) for name, module in modules if "layers." in name}


def test_a_step_is_that_of_both_losses(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config("memory.piece_tokens=40", "lora.dropout=0")
    moved = flat(adapter_weights(model_of(config))) - flat(adapter_weights(after_one_step(config, tmp_path / "loop")))
    gradient = flat(gradient_by_hand(config, 0, 1))
    assert_matches(moved / RATE, gradient.double(), tolerance=1e-4)


def test_accumulation_takes_the_mean(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config()
    model = model_of(config)
    start = flat(adapter_weights(model))
    trainer = trainer_of(model, config, tmp_path / "loop", gradient_accumulation_steps=2)
    trainer.train()
    assert_matches(
        (start - flat(adapter_weights(model))) / RATE, flat(gradient_by_hand(config, 0, 1, 2)).double(), tolerance=1e-4
    )


def test_terms_are_logged_and_the_model_given_back(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config()
    model = model_of(config, start=True)
    before = shape_of(model)
    trainer = trainer_of(model, config, tmp_path / "loop", max_steps=3)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "bend_unsafe" in row]
    assert len(logged) == 3
    assert logged[0]["bend_unsafe"] == logged[0]["bend_safe"] == 0.0
    assert logged[2]["bend_unsafe"] > 0
    assert shape_of(model) == before


def test_what_a_loop_must_be(tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config()
    model = model_of(config)
    trainer = trainer_of(model, config, tmp_path / "loop")
    with pytest.raises(UserError, match="needs a PEFT model"):
        trainer._begin(model.get_base_model())
    trainer.accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"))  # type: ignore[assignment]
    with pytest.raises(UserError, match="divides the adapter among processes"):
        trainer._begin(model)
    with pytest.raises(UserError, match="divides the base among several processes, and this loop has one"):
        trainer_of(model, tiny.config("distributed.shard=fsdp"), tmp_path / "alone")


@pytest.mark.parametrize("setting", ["objective.kl_limit=0.1", "training.normalize=step"])
def test_what_this_loop_cannot_follow_is_said(setting: str, tiny: TinyRun, tmp_path: Path) -> None:
    config = tiny.config(setting)
    with pytest.raises(UserError, match=rf"{setting}: .* here"):
        trainer_of(model_of(config), config, tmp_path / "loop")


class Measured(loop_memory.Measured, BentTrainer):
    """Its second micro-batch is measured."""


def test_the_loop_takes_no_more_memory_than_its_bending_alone(tiny: TinyRun, tmp_path: Path) -> None:
    """Of one micro-batch, above the model with its adapter's gradients: what a pass keeps is gone before the next."""
    config = tiny.config("memory.piece_tokens=40")
    model = model_of(config)
    trainer = trainer_of(model, config, tmp_path / "loop", kind=Measured, gradient_accumulation_steps=2)
    trainer.train()
    bender = Bender(config, model, load_tokenizer(config.model), steps=1)
    bender.backward(0, 1.0)
    alone = peak_bytes(lambda: bender.backward(0, 1.0), torch.device("cpu"))
    assert 0 < alone < 2**20
    assert 0.9 * alone < trainer.peak < 1.1 * alone
