"""The sides of the step benchmark: each is set up on the same adapted model, steps, and leaves the model as it was."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.baselines.eager_step import eager_step, prepare_eager
from benchmarks.baselines.peft_liger_step import peft_liger_step, prepare_peft_liger
from benchmarks.step.step_cases import LORA, WIDTH, Case, fill_adapter, streams_of
from repbend_fast.config.schema import MemoryConfig
from repbend_fast.data.records import Batch
from repbend_fast.errors import UserError
from repbend_fast.models import Prepared, attach_lora, find_decoder, prepared
from repbend_fast.models.causal import AdaptedLM, CausalLM
from repbend_fast.models.layers.changes import Changes
from repbend_fast.models.layers.liger import use_liger
from repbend_fast.models.layers.lora import set_dropout_rate
from repbend_fast.planning.budget import parse_budget
from repbend_fast.planning.cards import CUDA_CONTEXT
from repbend_fast.planning.planner import Planner
from repbend_fast.step import StreamRunner, dropout_seed
from repbend_fast.step.levers import Levers, levers_of

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Side:
    """One contender. ``memory``: our step under these settings, piece sizes being for a width of 1024; None for a
    baseline.

    ``budget``: our step under the levers that the planner chooses for it, on CUDA in a process that is capped at it.
    """

    name: str
    memory: dict[str, Any] | None = None
    budget: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it is no baseline."""
        return self.memory is not None or self.budget is not None


SMOKE_BUDGET = "64MB"


def budgets_for(device: torch.device, smoke: bool) -> list[str]:
    """Caps under which training is shown to run."""
    return [SMOKE_BUDGET] if smoke else ["8GB"] if device.type == "cuda" else []


class NotPlanned(Exception):
    """The planner refuses the side's budget."""


@dataclass
class Stepper:
    """A side set up on ``model``: ``step(batch)`` adds the gradient to its adapter and returns the unweighted terms.

    ``blocks`` are recomputed by a baseline; ours has a ``runner``. ``retreats``: what running out of memory has
    changed.
    """

    model: AdaptedLM
    step: Callable[[Batch], Terms]
    blocks: int = 0
    runner: StreamRunner | None = None
    retreats: list[str] = field(default_factory=list)

    @property
    def recomputed(self) -> int:
        """Blocks that are recomputed, as things stand."""
        return self.runner.levers.checkpoint_blocks if self.runner else self.blocks

    @property
    def levers(self) -> dict[str, object]:
        """The levers in force; none for a baseline."""
        return self.runner.levers.as_dict() if self.runner else {}


def sides_for(device: torch.device, smoke: bool) -> list[Side]:
    """All sides, in the order of a round."""
    baselines = [Side("eager"), Side("peft+liger"), Side("ours", {})]
    if device.type == "cuda" and not smoke:
        return baselines + [Side(f"ours {budget}", budget=budget) for budget in ("24GB", "12GB", "8GB")]
    return [
        *baselines,
        Side("ours fast", {"piece_tokens": 1536, "checkpoint_blocks": 0}),
        Side("ours small", {"piece_tokens": 512, "checkpoint_blocks": 16}),
    ]


@contextmanager
def adapted(case: Case, base: CausalLM) -> Iterator[AdaptedLM]:
    """LoRA with the published settings around ``base``, with non-zero values; taken off again."""
    model = attach_lora(base, LORA, case.objective.window)
    fill_adapter(model)
    try:
        yield model
    finally:
        model.unload()
        gc.collect()  # a PEFT model is a cycle


@contextmanager
def set_up(side: Side, case: Case, model: AdaptedLM, dropout: float) -> Iterator[Stepper]:
    """The side on an ``adapted`` model without gradients, on CUDA with Liger's layers for all but ``eager``, and under
    its cap.

    Baselines run PEFT's own LoRA layers with their own dropout, ours what ``models.surgery`` makes of them. The model
    is left as it was.
    """
    device = find_decoder(model).device
    with _capped(side, device), ExitStack() as left:
        left.callback(_plain, model)
        if side.ours:
            levers = _planned(case, side.budget) if side.budget else _set_by_hand(side, case, model)
            yield _ours(case, left.enter_context(prepared(model, levers, liger="auto", dropout=dropout)), levers)
        else:
            changes = Changes()
            left.callback(changes.undo)
            set_dropout_rate(model, dropout, changes)
            if side.name != "eager":
                use_liger(model, "auto", device, changes)
            yield _baseline(side, case, model)


def _plain(model: AdaptedLM) -> None:
    """Without gradients and without what a baseline switches on."""
    model.zero_grad(set_to_none=True)
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()


def _baseline(side: Side, case: Case, model: AdaptedLM) -> Stepper:
    blocks = find_decoder(model).num_blocks
    if side.name == "eager":
        prepare_eager(model)
        return Stepper(model, lambda batch: eager_step(model, batch, case.objective, case.width), blocks)
    prepare_peft_liger(model)
    return Stepper(model, lambda batch: peft_liger_step(model, batch, case.objective), blocks)


def _ours(case: Case, ready: Prepared, levers: Levers) -> Stepper:
    model, runner = cast(AdaptedLM, ready.model), StreamRunner(ready, levers)

    def step(batch: Batch) -> Terms:
        terms: Terms = {}
        for result in runner.backward_all(streams_of(case, model, batch), dropout_seed=dropout_seed(0, 0, 0)):
            terms |= result.terms
        return terms

    stepper = Stepper(model, step, runner=runner)
    runner.on_out_of_memory = lambda change, _: stepper.retreats.append(change)
    return stepper


def _set_by_hand(side: Side, case: Case, model: AdaptedLM) -> Levers:
    settings = dict(side.memory or {})
    if "piece_tokens" in settings:
        settings["piece_tokens"] = settings["piece_tokens"] * case.width // WIDTH
    return levers_of(MemoryConfig(**settings), model)


@cache
def _planner(case: Case, device: torch.device) -> Planner:
    return Planner(case.config(device), device)


@cache
def _planned(case: Case, budget: str) -> Levers:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return _planner(case, device).plan(parse_budget(budget)).levers
    except UserError as error:
        raise NotPlanned(str(error)) from error


@contextmanager
def _capped(side: Side, device: torch.device) -> Iterator[None]:
    size = parse_budget(side.budget) if side.budget else None
    if size is None or device.type != "cuda":
        yield
        return
    # What earlier sides left in the allocator's cache counts against the cap; so does, on a real card, the process's
    # context.
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (size - CUDA_CONTEXT) / torch.cuda.get_device_properties(device).total_memory
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
