"""What two processes do in tests, and the same in one: with ``ALONE`` a function gives what one process does."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bent_loop import after_one_step, held
from objective_runs import ALL_CONFIGS, OTHERWISE, SEARCHING, STEPS
from tiny_models import adapted_model, ragged_batch, tiny_model, wrap

from repbend_fast.config import load_config
from repbend_fast.config.schema import LoraConfig
from repbend_fast.distributed.ranks import Ranks
from repbend_fast.errors import UserError
from repbend_fast.models import find_decoder, prepared
from repbend_fast.models.load import quantize_nf4
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.sections import MethodConfig
from repbend_fast.step import StreamRunner, dropout_seed, runner
from repbend_fast.step.levers import EVERY_STREAM, Levers
from repbend_fast.step.terms import pairwise
from repbend_fast.training.checkpoint import adapter_weights
from repbend_fast.training.together import add_up_gradients
from repbend_fast.training.trainer import Trainer, train

EVERY = ALL_CONFIGS | SEARCHING | OTHERWISE
DROPOUT = LoraConfig(r=3, alpha=6, dropout=0.25)
PIECES = Levers({EVERY_STREAM: 14}, checkpoint_blocks=2, packing="on")
WHOLE = Levers()
MERGED = replace(PIECES, merge_streams="on")
HOW: dict[str, tuple[bool, Levers]] = {"merged pieces": (False, MERGED), "fsdp": (True, PIECES)}
"""By name: whether the base is divided, and the levers. A base that is divided has its streams apart."""


def here(lockstep: bool = False) -> Ranks:
    """The processes of this test."""
    return Ranks(dist.get_rank(), dist.get_world_size(), lockstep)


def five_steps(config: MethodConfig, ranks: Ranks, levers: Levers, steps: int = 5, model: Any = None) -> dict[str, Any]:
    """Five steps of Adam in float64 with dropout: the terms of each, the first gradient, the adapter behind them."""
    model = adapted_model(dtype=torch.float64, lora=DROPOUT) if model is None else model
    ready = prepared(model, levers, shards=torch.device("cpu") if ranks.lockstep else None)
    objective = build_objective(config, find_decoder(model).num_blocks, STEPS)
    own = StreamRunner(ready, levers, uses_head=objective.uses_head, ranks=ranks)
    optimizer = torch.optim.AdamW(own.parameters, lr=1e-3)
    terms, first = [], None
    for step in range(steps):
        streams = list(objective.streams(ragged_batch(), step))
        for result in own.backward_all(streams, dropout_seed=dropout_seed(5, step, 0)):
            terms += [float(result.loss), *(float(value) for _, value in sorted(result.terms.items()))]
            terms += [float(v) for _, by in sorted(result.layers.items()) for _, v in sorted(by.items())]
        add_up_gradients(ranks, own.parameters)
        if first is None:
            first = torch.cat([p.grad.flatten().clone() for p in own.parameters if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
    pieces = own.levers.piece_tokens
    return {"terms": terms, "gradient": first, "adapter": adapter_weights(model), "pieces": dict(pieces)}


def steps_of(name: str, ranks: Ranks, levers: Levers) -> dict[str, Any]:
    """As many steps of an objective as show what is its own: the second is behind an optimizer's."""
    return five_steps(EVERY[name], ranks, levers, steps=2 if name in OTHERWISE else 5)


def every_objective() -> dict[str, Any]:
    """Each objective in each way."""
    return {how: {name: steps_of(name, here(shard), levers) for name in EVERY} for how, (shard, levers) in HOW.items()}


@contextmanager
def short_of_memory(*calls: int) -> Iterator[None]:
    """The second process runs out of memory at these passes with a gradient or sums."""
    made = itertools.count(1)

    def failing(work: Callable[..., Any], *arguments: Any) -> Any:
        if dist.get_rank() == 1 and next(made) in calls:
            raise MemoryError
        return work(*arguments)

    own = runner.adapted_pass, pairwise.pairwise_sums
    runner.adapted_pass, pairwise.pairwise_sums = (partial(failing, work) for work in own)  # type: ignore[assignment]
    try:
        yield
    finally:
        runner.adapted_pass, pairwise.pairwise_sums = own


def retreats() -> dict[str, Any]:
    """One step of RepBend in which one process runs out of memory in a plain piece, in a first pass and in a piece
    behind it.
    """
    with short_of_memory(1, 3, 6):
        return five_steps(ALL_CONFIGS["repbend"], here(), WHOLE, steps=1)


def in_four_bits(ranks: Ranks) -> dict[str, Any]:
    """One step of RepBend on an NF4 base, in float32: its terms and gradient."""
    base = tiny_model()
    quantize_nf4(base, torch.float32, True, torch.device("cpu"))
    return five_steps(ALL_CONFIGS["repbend"], ranks, PIECES, steps=1, model=wrap(base, lora=DROPOUT))


def divided() -> dict[str, float]:
    """The share of each kind of weights that this process holds, of a model that is divided."""
    model = adapted_model()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    prepared(model, WHOLE, shards=torch.device("cpu"))
    kept = {name: getattr(p, "to_local", lambda p=p: p)().numel() / sizes[name] for name, p in model.named_parameters()}
    kinds = {"adapter": "lora_", "blocks": "base_layer", "ends": "embed_tokens"}
    return {kind: min(share for name, share in kept.items() if word in name) for kind, word in kinds.items()}


def trained(recipe: Path, name: str, *overrides: str) -> Path:
    """A run of the recipe beside it, as both processes train it."""
    folder = recipe.parent / name
    assert train(load_config(str(recipe), [*overrides, f"output.folder={folder}"])).exit_code == 0
    return folder


def resumed(folder: Path) -> int:
    """The exit code of a run that goes on in ``folder``."""
    return train(load_config(str(folder / "config.yaml"), [f"output.folder={folder}"]), folder).exit_code


def interrupted(recipe: Path, name: str) -> list[int]:
    """A run that one process alone is told to end, in its third step, and its resumption: both exit codes."""
    folder, step = recipe.parent / name, Trainer._train_step

    def signalled(self: Trainer, progress: Any) -> None:
        if self.step == 2 and self.ranks.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, progress)

    Trainer._train_step = signalled  # type: ignore[method-assign]
    try:
        first = train(load_config(str(recipe), [f"output.folder={folder}"])).exit_code
    finally:
        Trainer._train_step = step  # type: ignore[method-assign]
    return [first, resumed(folder)]


def refused(recipe: Path, *overrides: str) -> str:
    """What a run that cannot be says."""
    try:
        train(load_config(str(recipe), [*overrides, f"output.folder={recipe.parent / 'refused'}"]))
    except UserError as error:
        return str(error)
    return ""


def whole_runs(recipe: Path) -> dict[str, Any]:
    """Runs of a recipe, one of them a resumption of what one process began in ``begun``."""
    trained(recipe, "divided", "distributed.shard=fsdp", "memory.piece_tokens=60")
    return {
        "resumed": resumed(recipe.parent / "begun"),
        "interrupted": interrupted(recipe, "interrupted"),
        "few": refused(recipe, "training.examples=1"),
        "apart": refused(recipe, f"training.seed={3 + dist.get_rank()}"),
    }


def loop(recipe: Path, shard: str) -> dict[str, Any]:
    """The adapter behind a step of a Trainer that bends, and the share of the base that this process holds."""
    config = load_config(str(recipe), [f"distributed.shard={shard}"])
    model = after_one_step(config, recipe.parent / f"loop {shard}")
    return {"adapter": adapter_weights(model), "held": held(model)}


def everything(folder: Path) -> dict[str, Any]:
    """What one launch of two processes shows; ``folder`` holds a ``recipe.yaml``, ``begun``, and ``meeting`` for a file
    by which they meet.
    """
    recipe = folder / "recipe.yaml"
    trained(recipe, "two")  # joins by itself, as the launcher says, and leaves
    assert not dist.is_initialized()
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder.resolve()}/meeting", rank=number, world_size=count)
    found = {
        "loops": {shard: loop(recipe, shard) for shard in ("none", "fsdp")},
        "objectives": every_objective(),
        "retreats": retreats(),
        "divided": divided(),
        "nf4": in_four_bits(here(lockstep=True)),
        "runs": whole_runs(recipe),
    }
    dist.destroy_process_group()
    return found
