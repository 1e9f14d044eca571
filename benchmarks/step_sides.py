"""The sides of the step benchmark: each puts its own adapter on the same frozen model, steps, and leaves the model as it was."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from baselines.eager_step import eager_step, prepare_eager
from baselines.peft_liger_step import peft_liger_step, prepare_peft_liger
from step_cases import LORA, WIDTH, Case, fill_adapter, plain_lora
from torch import Tensor

from repbend_fast.config.schema import MemoryConfig
from repbend_fast.data.records import Batch
from repbend_fast.memory.levers import Levers, levers_of
from repbend_fast.models import attach_lora, find_decoder
from repbend_fast.models.liger import find_replaceable, use_liger
from repbend_fast.objectives import build_objective
from repbend_fast.step import StreamRunner, dropout_seed

Terms = dict[str, Tensor]
BOUND = ("forward", "extra_repr", "_get_name")
"""Attributes that Liger binds to a module in place of its class's own."""


@dataclass(frozen=True)
class Side:
    """One contender. ``memory`` holds the settings of our step's levers, piece sizes for a width of 1024; a baseline has none."""

    name: str
    memory: dict[str, Any] | None = None


@dataclass
class Stepper:
    """A side set up on a model: ``step(batch)`` adds the gradient to ``model``'s adapter and returns the unweighted terms."""

    model: Any
    step: Callable[[Batch], Terms]
    recomputed: int
    levers: dict[str, Any] = field(default_factory=dict)


@contextmanager
def set_up(side: Side, case: Case, base: Any, dropout: float) -> Iterator[Stepper]:
    """The side's adapter (equal values for all sides) on ``base``, on CUDA with Liger's layers for all but ``eager``."""
    with _liger_layers(base, side.name != "eager"):
        made = _ours(side, case, base, dropout) if side.memory is not None else _baseline(side, case, base, dropout)
        try:
            yield made
        finally:
            made.model.zero_grad(set_to_none=True)
            if base.is_gradient_checkpointing:
                base.gradient_checkpointing_disable()
            made.model.unload()
            base.eval()
            del made
            if find_decoder(base).device.type == "cuda":
                gc.collect()  # a PEFT model is a cycle: its adapter would stay in a capped device's way


def _baseline(side: Side, case: Case, base: Any, dropout: float) -> Stepper:
    model = plain_lora(base, dropout, case.config.window)
    fill_adapter(model)
    blocks = find_decoder(base).num_blocks
    if side.name == "eager":
        prepare_eager(model)
        return Stepper(model, lambda batch: eager_step(model, batch, case.config, case.width), blocks)
    prepare_peft_liger(model)
    return Stepper(model, lambda batch: peft_liger_step(model, batch, case.config), blocks)


def _ours(side: Side, case: Case, base: Any, dropout: float) -> Stepper:
    model = attach_lora(base, LORA.model_copy(update={"dropout": dropout}), case.config.window)
    fill_adapter(model)
    objective = build_objective(case.config, find_decoder(model).num_blocks)
    levers = _levers(side, case, model)
    runner = StreamRunner(model, levers, uses_head=objective.uses_head)

    def step(batch: Batch) -> Terms:
        terms: Terms = {}
        for stream in objective.streams(batch, 0):
            terms |= runner.backward(stream, dropout_seed=dropout_seed(0, 0, 0)).terms
        return terms

    return Stepper(model, step, levers.checkpoint_blocks, levers.as_dict())


def _levers(side: Side, case: Case, model: Any) -> Levers:
    settings = dict(side.memory or {})
    if "piece_tokens" in settings:
        settings["piece_tokens"] = settings["piece_tokens"] * case.width // WIDTH
    return levers_of(MemoryConfig(**settings), model)


@contextmanager
def _liger_layers(base: Any, wanted: bool) -> Iterator[None]:
    device = find_decoder(base).device
    if not wanted or device.type != "cuda":
        yield
        return
    use_liger(base, "auto", device)
    try:
        yield
    finally:
        found, body = find_replaceable(base), find_decoder(base).body
        for name in (*found.norms, *found.mlps, *found.attentions) if found else ():
            for attribute in BOUND:
                body.get_submodule(name).__dict__.pop(attribute, None)


def sides_for(device: torch.device) -> list[Side]:
    """All sides, in the order of a round."""
    del device
    return [
        Side("eager"),
        Side("peft+liger"),
        Side("ours", {}),
        Side("ours fast", {"piece_tokens": 1024, "checkpoint_blocks": 0}),
        Side("ours small", {"piece_tokens": 512, "checkpoint_blocks": "all"}),
    ]
