"""What a run's checkpoint holds of the trainer, and going on from one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from repbend_fast.config import resolved_yaml
from repbend_fast.console import say
from repbend_fast.errors import UserError
from repbend_fast.evaluation.sides import drop_stale
from repbend_fast.runs.folder import remove_leftovers, write_text
from repbend_fast.runs.metrics import NoLog
from repbend_fast.runs.tracking import TrackedLog
from repbend_fast.step.levers import Levers
from repbend_fast.training.checkpoint import (
    YARDSTICK,
    TrainingState,
    fixed_settings,
    load_checkpoint,
    made_on,
    moved_notes,
    set_aside_newer,
)
from repbend_fast.training.optimizer import load_moments

if TYPE_CHECKING:
    from repbend_fast.training.trainer import Trainer


def state_of(trainer: Trainer) -> TrainingState:
    """What ``resume_training`` needs, besides the adapter's weights, to go on from here."""
    return TrainingState(
        step=trainer.step,
        sampler=trainer.batches.state_dict(),
        guard=trainer.guard.state_dict(),
        stopped=trainer.stopped,
        settings=fixed_settings(trainer.config) | trainer.yardstick,
        limits=trainer.guard.limits_in_force(),
        units=dict(trainer.runner.units),
        kl_weight=trainer.kl_weight.value if trainer.kl_weight else None,
        first_levers=trainer.first_levers.as_dict(),
        last_levers=trainer.runner.levers.as_dict(),
        optimizer=trainer.optimizer.state_dict(),
        scaler=trainer.scaler.state_dict(),
        best=trainer.best_weights,
    )


def place_of(trainer: Trainer) -> dict[str, object]:
    """What the run's numbers depend on besides its settings."""
    return made_on(trainer.config, trainer.runner.device, trainer.ranks.count)


def resume_training(trainer: Trainer, checkpoint: Path) -> None:
    """Go on from a checkpoint, to the bit on the CPU."""
    state = load_checkpoint(checkpoint, trainer.config, trainer.model)
    if trainer.config.validation.every and state.guard["before"] is None:
        raise UserError(
            f"validation.every={trainer.config.validation.every}: validation cannot be switched on at --resume, since "
            "the model before "
            "training was not measured; resume with validation.every=0"
        )
    trainer.step = state.step
    trainer.stopped = state.stopped
    trainer.guard.load_state_dict(state.guard)
    # With validation off for a while, what it was measured on before stays to be compared with.
    trainer.yardstick = {key: value for key, value in state.settings.items() if key.startswith(YARDSTICK)}
    if trainer.stopped and state.limits != trainer.guard.limits_in_force():
        say(f"the guard {trainer.stopped}; its limits have changed, so training goes on")
        trainer.stopped = None
        trainer.guard.reopen()
    load_moments(trainer.optimizer, state.optimizer, trainer.config.training)
    if state.scaler:  # empty in all dtypes but float16, in which the run may go on
        trainer.scaler.load_state_dict(state.scaler)
    weight = state.kl_weight
    if trainer.kl_weight and weight is not None:
        trainer.kl_weight.set(weight)
    elif weight is not None:
        say(
            f"note: objective.kl_limit is off from here on, so the KL's weight goes from {weight:.4g} back to the "
            "configured one"
        )
    trainer.best_weights = state.best
    if not trainer.config.validation.every:
        if trainer.stopped:
            say(f"the guard {trainer.stopped}; validation is off from here on, so training goes on")
            trainer.stopped = None
        if trainer.step < trainer.config.training.steps:
            # Nothing measures the steps to come, so what was best so far is no reason to drop them.
            trainer.best_weights = trainer.guard.best = None
    # What ran out of memory once would do so again, unless the levers were set anew.
    if state.first_levers and Levers(**state.first_levers) == trainer.first_levers:
        trainer.runner.levers = Levers(**state.last_levers)
    for note in moved_notes(checkpoint, place_of(trainer), trainer.config.lora.dropout):
        say(note)
    _open_folder(trainer, checkpoint)
    trainer.use_units(state.units)
    trainer.log.write("event", trainer.step, event="resumed", reason=checkpoint.name)
    trainer.log_proof()
    say(f"resumed from {checkpoint} at step {trainer.step}")


def _open_folder(trainer: Trainer, checkpoint: Path) -> None:
    """Make the folder that of the run as it goes on; the first process's business, once all have read the
    checkpoint.
    """
    trainer.ranks.gathered(None)
    if not trainer.ranks.first:
        trainer.log = NoLog()
        return
    set_aside_newer(trainer.run, checkpoint)
    remove_leftovers(trainer.run)
    drop_stale(trainer.run, trainer.config)
    # Settings given with --resume belong to the run from here on, also when it is resumed again.
    write_text(trainer.run.config, resolved_yaml(trainer.config))
    trainer.log = TrackedLog(trainer.config, trainer.run, last_step=trainer.step)
