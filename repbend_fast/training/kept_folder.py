"""A run whose folder is removed or moved away while it trains keeps what it has learned: the folder is made again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repbend_fast.config import resolved_yaml
from repbend_fast.console import say
from repbend_fast.runs.folder import write_text
from repbend_fast.training.checkpoint import save_adapter

if TYPE_CHECKING:
    from repbend_fast.training.trainer import Trainer


def keep_folder(trainer: Trainer) -> bool:
    """Look for the run's folder, once a step. Returns whether it had to be made again, so that a checkpoint is due."""
    run = trainer.run
    if not trainer.ranks.first or run.config.is_file():
        return False
    write_text(run.config, resolved_yaml(trainer.config))
    if trainer.best_weights is not None and not run.adapter.is_dir():
        save_adapter(trainer.model, run.adapter, trainer.best_weights)
    trainer.write_units()
    reason = f"{run.config} was removed or moved away while the run trains"
    trainer.log.write("event", trainer.step, event="folder_made_again", reason=reason)
    say(f"note: {reason}; it is written again and a checkpoint saved. Steps, and checkpoints before it, may be gone")
    return True
