"""Memory of bending in a ``transformers`` ``Trainer`` beside our own loop: ``python -m benchmarks.memory.loop_memory
[RECIPE [key=value …]]`` writes ``benchmarks/results/loop_memory.json``.

Each side runs two micro-batches of the same records; the second is measured, when the adapter has its gradients: the
most bytes held at one time above those before. The Trainer's own records are conversations of the recipe's retain role,
two at a time, cut to ``OWN`` tokens. The published step has no refusal term and recomputes every block.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from benchmarks.baselines.eager_step import eager_step, prepare_eager
from benchmarks.harness import RESULTS, write_json
from benchmarks.measure import peak_bytes
from repbend_fast.config import Config, load_config
from repbend_fast.console import saying
from repbend_fast.environment import environment
from repbend_fast.errors import UserError
from repbend_fast.integration import BendingMixin
from repbend_fast.models import load_tokenizer
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.runs.folder import RunFolder
from repbend_fast.training.trainer import Trainer as OwnLoop
from repbend_fast.training.trainer import make_ready, make_trainer

RECORD = RESULTS / "loop_memory.json"
OWN = 128


class Measured(Trainer):
    """Its second micro-batch is measured: ``peak`` in bytes."""

    peak: int | None = None

    def training_step(self, model: nn.Module, *arguments: object, **named: object) -> Tensor:
        """As ever."""
        found: list[Tensor] = []

        def step() -> None:
            found.append(super(Measured, self).training_step(model, *arguments, **named))  # type: ignore[arg-type]

        if self.peak is None:
            step()
            self.peak = 0
        else:
            self.peak = peak_bytes(step, torch.device(self.args.device))
        return found[0]


class _Bending(BendingMixin, Trainer):  # type: ignore[misc]
    """Below ``Measured``, so that both losses are."""


class Bent(Measured, _Bending):  # type: ignore[misc]
    """With bending."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.recipe, arguments.overrides)
    if not isinstance(config.objective, RepBendConfig):
        raise UserError(f"objective.name={config.objective.name}: must be repbend, as the published step is")
    with tempfile.TemporaryDirectory() as folder, saying(None):
        own = make_trainer(config, RunFolder(folder), make_ready(config, RunFolder(folder), False))
        found = _measured(own, config, folder)
    record = {**environment(), "recipe": arguments.recipe, "levers": own.first_levers.as_dict(), "peak_bytes": found}
    write_json(arguments.out, record)
    return 0


def _measured(own: OwnLoop, config: Config, folder: str) -> dict[str, int]:
    batches = [own.data.sampler.next_batch() for _ in range(2)]
    streams = [list(own.objective.streams(batch, 0)) for batch in batches]
    found = {"own loop": _second(own, lambda turn: own.runner.backward_all(streams[turn], dropout_seed=turn))}
    own.runner.prepared.restore()
    ids = [sequence.ids[:OWN] for batch in batches for sequence in batch.retain[:2]]
    shortest = min(map(len, ids))
    talk = [{"input_ids": torch.tensor(each[:shortest]), "labels": torch.tensor(each[:shortest])} for each in ids]
    loop = TrainingArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=len(talk) // 2,
        gradient_accumulation_steps=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=own.runner.device.type == "cpu",
    )
    model = cast(PreTrainedModel, own.model)
    sides = {
        "in a Trainer": Bent(
            model=model, args=loop, train_dataset=talk, processing_class=load_tokenizer(config.model), bending=config
        ),
        "Trainer without bending": Measured(model=model, args=loop, train_dataset=talk),
    }
    for name, side in sides.items():
        side.train()
        found[name] = side.peak or 0
    prepare_eager(own.model)
    objective = cast(RepBendConfig, config.objective).at_depth(own.runner.decoder.num_blocks)
    published = _second(own, lambda turn: eager_step(own.model, batches[turn], objective))
    return {"all hidden states kept": published, **found}


def _second(own: OwnLoop, step: Callable[[int], object]) -> int:
    for parameter in own.parameters:
        parameter.grad = None
    step(0)
    return peak_bytes(lambda: step(1), own.runner.device)


if __name__ == "__main__":
    sys.exit(main())
