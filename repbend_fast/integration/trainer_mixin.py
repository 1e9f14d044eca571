"""A recipe's objective beside the loss of a ``transformers`` ``Trainer``, or of one derived from it such as TRL's.

::

    class Bent(BendingMixin, SFTTrainer):
        pass

    Bent(model=peft_model, args=…, train_dataset=…, bending=load_config("mine.yaml")).train()

Each micro-batch of the loop adds the gradient of one micro-batch of the recipe's records: the same streams, taps and
head losses, in the same pieces, as ``repbend-fast train`` runs, so that no tuple of hidden states is kept. The loop's
own backward follows; under its ``DistributedDataParallel`` that averages both over the processes. With
``distributed.shard=fsdp`` in the recipe these divide the frozen base among them by FSDP2, as in our own loop.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from repbend_fast.config import Config
from repbend_fast.data.records import Batch
from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.distributed.ranks import ALONE, Ranks
from repbend_fast.errors import UserError
from repbend_fast.models import find_decoder, load_tokenizer
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.layers.sharded import leave_to_fsdp, shard_blocks
from repbend_fast.models.layers.switches import evaluation_mode
from repbend_fast.objectives import build_objective, roles_of
from repbend_fast.objectives.sections import KLLimitConfig
from repbend_fast.runs.prepare import prepare_data
from repbend_fast.step import checked_runner, dropout_seed
from repbend_fast.step.levers import levers_of
from repbend_fast.step.units import measure_units
from repbend_fast.step.zero_start import check_zero, is_at_start

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerState, TrainingArguments

    class _Loop:
        """What is used of transformers' ``Trainer``."""

        model: nn.Module
        args: TrainingArguments
        state: TrainerState
        accelerator: Accelerator
        processing_class: object
        current_gradient_accumulation_steps: int

        def __init__(self, *arguments: object, **named: object) -> None: ...
        def train(self, *arguments: object, **named: object) -> object: ...
        def training_step(self, model: nn.Module, *arguments: object, **named: object) -> Tensor: ...
        def log(self, logs: dict[str, float], *arguments: object, **named: object) -> None: ...
        def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None: ...
else:
    _Loop = object

DIVIDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Ways of accelerate in which a process does not hold the whole adapter."""


class BendingMixin(_Loop):
    """To stand before ``Trainer`` among the bases of a class.

    Args:
        bending: a recipe. Of it count ``objective``, ``data``, ``memory``, ``training.examples``, its
            ``retain_examples`` and ``refusal_examples``, ``training.autocast``, ``training.seed``, ``model.liger`` and
            ``distributed``; model, optimizer, steps and accumulation are the loop's.

    Raises:
        UserError: a recipe that only the trainer's own loop can follow; from ``train``, a model without a PEFT adapter,
            a loop that divides the adapter among processes, or a base to be divided in a process that is alone.
    """

    def __init__(self, *arguments: object, bending: Config, **named: object) -> None:
        _check_recipe(bending)
        self.bending = bending
        super().__init__(*arguments, **named)
        self._bender: Bender | None = None

    def train(self, *arguments: object, **named: object) -> object:
        """As the loop's own; the model is given back as it was, but for a base that was divided."""
        self._divide(self.model)
        try:
            return super().train(*arguments, **named)
        finally:
            if self._bender is not None:
                self._bender.close()
                self._bender = None

    def training_step(self, model: nn.Module, *arguments: object, **named: object) -> Tensor:
        """The loss of both, detached; both gradients are in the adapter."""
        if self._bender is None:
            self._bender = self._begin(model)
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        bent = self._bender.backward(self.state.global_step, scale / self.current_gradient_accumulation_steps)
        own = super().training_step(model, *arguments, **named)
        return own + bent.to(own) / self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], *arguments: object, **named: object) -> None:
        """The mean of each term since the last time goes along, as ``bend_NAME``."""
        if self._bender is not None and "loss" in logs:
            logs = logs | self._bender.means()
        super().log(logs, *arguments, **named)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # The whole may not fit on the device that the loop would move it to.
        self._divide(model)
        super()._move_model_to_device(model, device)

    def _divide(self, model: nn.Module) -> None:
        if self.bending.distributed.shard == "none":
            return
        adapted = self._adapted(model)
        if self.args.world_size == 1:
            raise UserError(
                "distributed.shard=fsdp divides the base among several processes, and this loop has one; start it with "
                "torchrun --nproc-per-node N, or set distributed.shard=none"
            )
        shard_blocks(adapted, find_decoder(adapted).layers, self.args.device)
        leave_to_fsdp(adapted)

    def _adapted(self, model: nn.Module) -> CausalLM:
        """The PEFT model in the loop's, whole in this process but for what ``_divide`` divides."""
        kind = self.accelerator.distributed_type.value
        if any(kind.startswith(divided) for divided in DIVIDED):
            raise UserError(
                f"a loop under {kind} divides the adapter among processes; let it use DistributedDataParallel, and set "
                "distributed.shard=fsdp in the recipe, which divides the base alone"
            )
        inner = self.accelerator.unwrap_model(model)
        if not hasattr(inner, "get_base_model"):
            raise UserError("bending needs a PEFT model with a LoRA adapter; give peft_config, or wrap the model")
        return cast(CausalLM, inner)

    def _begin(self, model: nn.Module) -> Bender:
        tokenizer = cast(Tokenizer, self.processing_class) if self.processing_class else None
        turns, turn = self.args.world_size, self.args.process_index
        shared = Ranks(turn, turns, lockstep=True) if self.bending.distributed.shard == "fsdp" else ALONE
        bender = Bender(self.bending, self._adapted(model), tokenizer, self.state.max_steps, shared)
        bender.turns, bender.turn = turns, turn
        bender.skip(self.state.global_step * self.args.gradient_accumulation_steps)
        return bender


def _check_recipe(config: Config) -> None:
    """What would otherwise be left out without a word."""
    objective = config.objective
    if isinstance(objective, KLLimitConfig) and objective.kl_limit is not None:
        raise UserError(
            f"objective.kl_limit={objective.kl_limit:g}: a weight that moves with the KL is kept by repbend-fast train "
            "alone; set it to null here, and the weight by hand"
        )
    if config.training.normalize == "step":
        raise UserError(
            "training.normalize=step: the micro-batches of this loop come one at a time; set it to micro_batch here"
        )


class Bender:
    """The bending part of somebody else's loop on ``model``, which is prepared for it until ``close``.

    Attributes:
        turns, turn: of so many batches in a row this process takes the one of this number.

    Args:
        tokenizer: that of the records; None = the recipe's.
        steps: optimizer steps of the loop, for weights that follow a schedule.
        ranks: processes in lockstep, which hold a part of the base each. Every pass needs all of them, so that they
            run their batches one after the other, each its share of all.
    """

    def __init__(
        self, config: Config, model: CausalLM, tokenizer: Tokenizer | None, steps: int, ranks: Ranks = ALONE
    ) -> None:
        blocks = find_decoder(model).num_blocks
        seed = config.training.seed
        self.objective = build_objective(config.objective, blocks, steps, seed)
        data = prepare_data(config, tokenizer or load_tokenizer(config.model), roles_of(config.objective))
        self.seed, self.sampler = seed, data.sampler
        self.turns, self.turn = 1, 0
        self._drawn = 0
        self._sums: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._checked = not is_at_start(model)
        with evaluation_mode(model):
            levers = levers_of(config.memory, model)
            self.runner = checked_runner(model, config, levers, self.objective.uses_head, ranks)
            if config.objective.counts_in_reference:
                self.runner.units.update(measure_units(self.runner, self.objective, data.sampler.sets))

    def close(self) -> None:
        """Give the model back."""
        self.runner.prepared.restore()

    def skip(self, batches: int) -> None:
        """Draw what an earlier part of the run has used."""
        for _ in range(batches):
            self._next()

    def backward(self, step: int, scale: float) -> Tensor:
        """Add ``scale`` × the gradient of the next micro-batch to the adapter. Returns its loss, detached.

        In lockstep, a share of the gradient of everybody's micro-batches, whose mean over the processes is that of
        their own ones; and the mean of their losses.
        """
        drawn = self._next()
        turns = range(self.turns) if self.runner.ranks.lockstep else [self.turn]
        losses = [
            self._backward(drawn[turn], step, scale, dropout_seed(self.seed, self._drawn, turn)) for turn in turns
        ]
        return torch.stack(losses).mean()

    def _backward(self, batch: Batch, step: int, scale: float, seed: int) -> Tensor:
        # A model's own dropout, on in the loop's mode, would make the adapted pass differ from the reference.
        with evaluation_mode(self.runner.model):
            streams = list(self.objective.streams(batch, step))
            results = self.runner.backward_all(streams, scale, dropout_seed=seed)
        for stream, result in zip(streams, results):
            if not self._checked:
                check_zero(stream, result)
        self._checked = True
        for result in results:
            for name, value in result.terms.items():
                self._sums[name].append(value)
        return torch.stack([result.loss for result in results]).sum()

    def means(self) -> dict[str, float]:
        """The mean of each term since the last call."""
        found = {f"bend_{name}": float(torch.stack(values).mean()) for name, values in self._sums.items()}
        self._sums.clear()
        return found

    def _next(self) -> list[Batch]:
        """Of each process."""
        self._drawn += 1
        return [self.sampler.next_batch() for _ in range(self.turns)]
