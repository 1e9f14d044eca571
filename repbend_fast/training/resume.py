"""What a run's checkpoint holds of the trainer, and going on from one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from repbend_fast.config import resolved_yaml
from repbend_fast.console import say
from repbend_fast.errors import UserError
from repbend_fast.evaluation.sides import drop_stale
from repbend_fast.runs.folder import remove_leftovers, write_text
from repbend_fast.runs.metrics import MetricsLog
from repbend_fast.step.levers import Levers
from repbend_fast.training.checkpoint import YARDSTICK, TrainingState, fixed_settings, load_checkpoint
from repbend_fast.training.optimizer import load_moments

if TYPE_CHECKING:
    from repbend_fast.training.trainer import Trainer


def state_of(trainer: Trainer) -> TrainingState:
    """What ``resume_training`` needs, besides the adapter's weights, to go on from here."""
    plain = {
        "sampler": trainer.batches.state_dict(),
        "guard": trainer.guard.state_dict(),
        "stopped": trainer.stopped,
        "settings": fixed_settings(trainer.config) | trainer.yardstick,
        "limits": trainer.guard.limits_in_force(),
        "units": {str(layer): unit for layer, unit in trainer.runner.units.items()},
        "kl_weight": trainer.kl_weight.value if trainer.kl_weight else None,
        "levers": {"first": trainer.first_levers.as_dict(), "last": trainer.runner.levers.as_dict()},
    }
    tensors = {
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "best": trainer.best_weights,
    }
    return TrainingState(trainer.step, plain, tensors)


def resume_training(trainer: Trainer, checkpoint: Path) -> None:
    """Go on from a checkpoint, to the bit on the CPU."""
    state = load_checkpoint(checkpoint, trainer.config, trainer.model)
    if trainer.config.validation.every and state.plain["guard"]["before"] is None:
        raise UserError(
            f"validation.every={trainer.config.validation.every}: validation cannot be switched on at --resume, since "
            "the model before "
            "training was not measured; resume with validation.every=0"
        )
    trainer.step = state.step
    trainer.stopped = state.plain["stopped"]
    trainer.guard.load_state_dict(state.plain["guard"])
    # With validation off for a while, what it was measured on before stays to be compared with.
    trainer.yardstick = {key: value for key, value in state.plain["settings"].items() if key.startswith(YARDSTICK)}
    if trainer.stopped and state.plain["limits"] != trainer.guard.limits_in_force():
        say(f"the guard {trainer.stopped}; its limits have changed, so training goes on")
        trainer.stopped = None
        trainer.guard.reopen()
    load_moments(trainer.optimizer, state.tensors["optimizer"], trainer.config.training)
    trainer.scaler.load_state_dict(state.tensors["scaler"])
    weight = state.plain.get("kl_weight")
    if trainer.kl_weight and weight is not None:
        trainer.kl_weight.set(weight)
    elif weight is not None:
        say(
            f"note: objective.kl_limit is off from here on, so the KL's weight goes from {weight:.4g} back to the "
            "configured one"
        )
    trainer.best_weights = state.tensors["best"]
    if not trainer.config.validation.every:
        if trainer.stopped:
            say(f"the guard {trainer.stopped}; validation is off from here on, so training goes on")
            trainer.stopped = None
        if trainer.step < trainer.config.training.steps:
            # Nothing measures the steps to come, so what was best so far is no reason to drop them.
            trainer.best_weights = trainer.guard.best = None
    # What ran out of memory once would do so again, unless the levers were set anew.
    if state.plain.get("levers", {}).get("first") == trainer.first_levers.as_dict():
        trainer.runner.levers = Levers(**state.plain["levers"]["last"])
    remove_leftovers(trainer.run)
    drop_stale(trainer.run, trainer.config)
    # Settings given with --resume belong to the run from here on, also when it is resumed again.
    write_text(trainer.run.config, resolved_yaml(trainer.config))
    trainer.log = MetricsLog(trainer.run.metrics, last_step=trainer.step)
    trainer.use_units({int(layer): unit for layer, unit in state.plain.get("units", {}).items()})
    trainer.log.write("event", trainer.step, event="resumed", reason=checkpoint.name)
    trainer.log_proof()
    say(f"resumed from {checkpoint} at step {trainer.step}")
