"""What ``repbend-fast`` does, as functions. The command line calls the same ones.

Nothing here prints, ends the process or leaves a handler of signals behind. What a command would print goes to ``say``,
line by line (``say=print``), and nowhere without it. Bad input is a :class:`~repbend_fast.errors.UserError` with one
line that names it and the remedy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from repbend_fast.console import Say, hushed, saying
from repbend_fast.errors import UserError
from repbend_fast.nearby import own_path

if TYPE_CHECKING:
    from repbend_fast.assessment.run import Assessment
    from repbend_fast.config import Config
    from repbend_fast.config.overrides import Overlays, Overrides
    from repbend_fast.evaluation.sides import Evaluation
    from repbend_fast.planning.planned import PlannedRun

PathLike = str | os.PathLike[str]
BATCH_SIZE = 32
"""Prompts at once in :func:`assess`."""
WRITTEN_TOGETHER = 128
"""Prompts at once in :func:`make_data`, of each process. Where they do not fit into memory, they are halved."""


@dataclass(frozen=True)
class Run:
    """A run's folder after training. ``interrupted``: Ctrl-C or SIGTERM ended it early; ``train(resume=run.folder)``
    goes on.
    """

    folder: Path
    interrupted: bool = False

    @property
    def adapter(self) -> Path:
        """The folder of the best adapter, in PEFT format."""
        return self.folder / "adapter"

    @property
    def evaluation(self) -> Evaluation | None:
        """What was measured before and after training; None without ``evaluation.prompts``, or before the run is
        finished.
        """
        from repbend_fast.evaluation.sides import Evaluation, read_evaluation

        path = self.folder / "evaluation.json"
        found = read_evaluation(path)
        return Evaluation(found["before"], found["after"], path) if "before" in found and "after" in found else None


def load_config(
    recipe: PathLike | Config, overrides: Overrides = (), *, overlays: Overlays = (), say: Say | None = None
) -> Config:
    """The whole configuration of a run, checked. Reads no weights and no data.

    Args:
        recipe: name of a shipped recipe (``repbend-fast recipes ls``), path of a YAML file, or a configuration, which
            stays as it is.
        overrides: settings on top, ``{"training.steps": 60}`` or as on a command line, ``["training.steps=60"]``. The
            last word of a key is enough where it is unambiguous, and the argument names of the published ``train.sh``
            are known.
        overlays: names of shipped overlays (``"qlora"``) or paths of YAML files, which go on top of the recipe in their
            order.
        say: receives a line for each setting that is accepted without effect.

    Returns:
        A pydantic model: ``config.training.steps``. Assignment is validated.

    Raises:
        UserError: an unknown or ambiguous key, a value that is not allowed, settings that exclude each other, a file
            that is not there.
    """
    from repbend_fast.config import load_config as load

    with saying(say):
        return load(recipe, overrides, overlays=overlays)


def train(
    config: PathLike | Config | None = None,
    overrides: Overrides = (),
    *,
    overlays: Overlays = (),
    resume: bool | PathLike = False,
    say: Say | None = None,
) -> Run:
    """Train an adapter, keep the best one, and measure the model before and after where ``evaluation.prompts`` asks for
    it.

    An earlier run in ``output.folder`` is moved aside, never overwritten. While it trains, the first Ctrl-C or SIGTERM
    finishes the step and saves, the second raises; the handlers that were there before come back. Only the main thread
    can listen to them.

    Args:
        config: a configuration, or a recipe as :func:`load_config` takes it. None only to resume a folder by its own
            configuration.
        overrides, overlays: as in :func:`load_config`; on top of the folder's own configuration where a run is resumed.
        resume: the folder of a run to go on with, from its last checkpoint; True for the configuration's
            ``output.folder``.
        say: receives what a command line shows: notes, the plan for a memory budget, a line per logged step,
            validations, tables.

    Returns:
        The run: its ``folder``, the ``adapter``, whether it was ``interrupted``, and the ``evaluation``.

    Raises:
        UserError: anything in configuration, data, model or folder that must be mended; memory or disk that ran out; a
            loss that is not finite. Checkpoints that were saved stay.
        KeyboardInterrupt: the second Ctrl-C, or one outside the training steps.
    """
    from repbend_fast.config import check_files

    with saying(_of_the_first(say)):
        settings, folder = training_config(config, overrides, overlays, resume)
        check_files(settings)
        with hushed():
            from repbend_fast.training.trainer import train as run_training

            result = run_training(settings, folder)
            return Run(Path(result.folder), interrupted=result.exit_code != 0)


def evaluate(
    target: PathLike | Config,
    overrides: Overrides = (),
    *,
    overlays: Overlays = (),
    out: PathLike | None = None,
    say: Say | None = None,
) -> Evaluation:
    """Measure attacks, usefulness, perplexity and KL: of a run with its adapter, or of a recipe's model as it is.

    Args:
        target: the folder of a run, a recipe as :func:`load_config` takes it, or a configuration.
        overrides, overlays: as in :func:`load_config`; ``{"evaluation.prompts.path": "harmbench.csv"}`` asks other
            prompts.
        out: where the JSON goes. By default a run's ``evaluation.json``, ``evaluation-PROMPTS.json`` beside it where
            prompts or settings are not the run's own, and no file for a recipe.
        say: receives the table and the file's name.

    Returns:
        ``before`` without adapter and, for a run, ``after`` with it: rates from 0 to 1 by name, such as
        ``after["attack_direct"]``.

    Raises:
        UserError: a run without an adapter, prompts or data that cannot be read, a file that cannot be written.
    """
    from repbend_fast.config import Config, check_files

    with saying(say):
        folder = None if isinstance(target, Config) else own_path(target)
        folder = folder if folder is not None and folder.is_dir() else None
        config = load_config(target if folder is None else run_config(folder), overrides, overlays=overlays, say=say)
        check_files(config)
        with hushed():
            from repbend_fast.evaluation.sides import evaluate_target

            return evaluate_target(config, folder, _own(out))


def assess(
    target: PathLike,
    overrides: Overrides = (),
    *,
    overlays: Overlays = (),
    adapter: PathLike | None = None,
    suites: Sequence[str] | str = (),
    attacks: Sequence[str] | str = (),
    judges: Sequence[str] | str = (),
    out: PathLike | None = None,
    chat: PathLike | None = None,
    base_of: PathLike | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    say: Say | None = None,
) -> Assessment:
    """Attack any model that loads, judge its answers, and count: with an adapter, base and bent on the same prompts.

    Every answer is a row of ``answers.jsonl`` as it comes. Called again with the same settings it goes on where it was
    interrupted, and asks nothing when all is answered.

    Args:
        target: the folder of a run or of one of its checkpoints, a folder with a model or an adapter, a GGUF file, a
            hub name, ``package:NAME``, or a recipe, whose model is meant.
        overrides, overlays: of ``model``, ``data.chat_template_kwargs``, ``memory.budget``, as in :func:`load_config`.
        adapter: a PEFT adapter (folder or hub name) that makes the bent side.
        suites: names of published sets, ``demo``, files, ``NAME:FILE``, or ``owner/name``; by default ``demo``.
        attacks: ``NAME`` or ``NAME:key=value,…``; ``all``; by default ``direct``, ``prefill`` and ``template``.
        judges: ``NAME`` or ``NAME:key=value,…``; by default ``rule``.
        out: the folder of all that is written; by default ``eval`` in a run's, else ``runs/eval/NAME``.
        chat: ordinary conversations that perplexity and KL are measured on: a file of records, ``owner/name``, or
            ``demo``. By default those that the demo's suite holds out, else the base's own answers.
        base_of: the folder of another evaluation of the same model in the same way, whose answers of the base are
            taken: several adapters need it asked once.
        limit: at most that many prompts of each kind and suite, spread evenly, and of
            different items as far as there are.
        max_new_tokens: an answer's length; by default 64 for the demo's prompts and 512 for others.
        batch_size, seed: prompts at once, and what attacks draw from.
        say: receives progress, the tables and the file's name.

    Returns:
        ``folder``, and ``summary``: what ``eval.json`` holds.

    Raises:
        UserError: unknown names or settings, prompts or a model that cannot be read, an ``out`` or a ``base_of`` of
            other settings.
    """
    with saying(say), hushed():
        from repbend_fast.assessment import run as assessment

        asked = assessment.Request(
            os.fspath(target), _text(adapter), _several(suites), _several(attacks), _several(judges)
        )
        asked = replace(asked, chat=_text(chat), overrides=overrides, overlays=overlays)
        asked = replace(asked, out=_own(out), base_of=_own(base_of))
        return assessment.assess(
            replace(asked, limit=limit, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed)
        )


def _own(path: PathLike | None) -> Path | None:
    return None if path is None else own_path(path)


def _text(path: PathLike | None) -> str | None:
    return None if path is None else os.fspath(path)


def _several(names: Sequence[str] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def make_data(
    policy: PathLike,
    model: PathLike,
    out: PathLike,
    overrides: Overrides = (),
    *,
    overlays: Overlays = (),
    limit: int | None = None,
    seed: int | None = None,
    batch_size: int = WRITTEN_TOGETHER,
    say: Say | None = None,
) -> Path:
    """Let a model write its own training data for a policy: complying answers, refusals, and what is to stay.

    Every answer is a row of ``answers.jsonl`` as it comes. Called again with the same settings it goes on where it was
    interrupted. Of several processes (``torchrun``), all of which have to call it, the first writes, and each generates
    a part.

    Args:
        policy: a YAML file, or the name of a shipped policy.
        model: who writes, as :func:`assess` takes it.
        out: a folder, or a file that ends in ``.jsonl`` for the training records, with the rest beside it.
        overrides, overlays: of ``model`` and ``data.chat_template_kwargs``, as in :func:`load_config`.
        limit: at most so many of everything.
        seed: in place of the policy's.
        batch_size: prompts at once, of each process.
        say: receives progress, the tables and the command that trains.

    Returns:
        The overlay that trains on the data: ``train("any", overlays=[made])``.

    Raises:
        UserError: something in the policy to mend, a model that cannot be loaded or whose answers are of no use, an
            ``out`` that holds something else.
    """
    with saying(_of_the_first(say)), hushed():
        from repbend_fast.making.make import Request, make_data

        request = Request(os.fspath(policy), os.fspath(model), own_path(out), batch_size, limit, seed)
        return make_data(replace(request, overrides=overrides, overlays=overlays))["overlay.yaml"]


def export(
    run: PathLike,
    out: PathLike | None = None,
    *,
    format: str = "merged",
    gguf_type: str | None = None,
    check: bool = True,
    bound: float | None = None,
    say: Say | None = None,
) -> Path:
    """Write a run's result as other programs take it, load it again, and compare it with what was trained.

    A run on NF4 weights is merged into the unquantised base, another model than the one that was measured; ``say`` gets
    a line about it.

    Args:
        run: the folder of a run.
        out: a folder that is not there yet or is empty; ``FORMAT`` in the run's by default.
        format: ``merged``, an ordinary transformers folder; ``adapter``, in PEFT format; ``gguf``, with Ollama's
            Modelfile.
        gguf_type: of the GGUF file's weights, ``f16``, ``q8_0`` and others; by default that of ``model.dtype``.
        check: load what was written and compare logits, template and special tokens; rounded to NF4 and Q4_K_M too.
        bound: on the KL divergence from the trained model, in nats per position.
        say: receives notes and what the check found.

    Returns:
        The folder that was written.

    Raises:
        CheckFailedError: what was written is not what was trained; it stays, to be looked at.
        UserError: no run or no adapter there yet, ``out`` holds something, it cannot be written, or a family whose GGUF
            files are not written here.
    """
    from repbend_fast.runs.folder import check_new

    with saying(say):
        folder = run_config(run).parent
        target = folder / format if out is None else own_path(out)
        check_new(target)
        with hushed():
            from repbend_fast.exports.export import export_run
            from repbend_fast.exports.request import Request

            export_run(Request(folder, target, format, gguf_type, check, bound))
            return target


def plan(
    config: PathLike | Config,
    overrides: Overrides = (),
    *,
    overlays: Overlays = (),
    card: str | None = None,
    say: Say | None = None,
) -> PlannedRun:
    """Say beforehand whether a run fits, with which levers, and how fast it would be. Needs no weights and no GPU.

    Args:
        config: a configuration, or a recipe as :func:`load_config` takes it; it need not name data.
        overrides, overlays: as in :func:`load_config`; ``{"memory.budget": "8GB"}`` plans for that much.
        card: a card's name, such as ``"4060"``, ``"3090"`` or ``"a100"``; by default this machine's device.
        say: receives notes.

    Returns:
        The plan: ``total_bytes``, ``seconds_per_step``, ``as_dict()``, ``lines()``.

    Raises:
        UserError: an unknown card, a model that cannot be planned, or a budget that cannot be kept, with the smallest
            that can.
    """
    with saying(say):
        from repbend_fast.config import load_config as load

        settings = load(config, overrides, overlays=overlays, needs_data=False)
        with hushed():
            from repbend_fast.planning.planned import planned_run

            return planned_run(settings, card)


def training_config(
    config: PathLike | Config | None, overrides: Overrides, overlays: Overlays, resume: bool | PathLike
) -> tuple[Config, Path | None]:
    """The configuration that :func:`train` would train, and the folder that it would go on with; None for a new run.

    Raises:
        UserError: as :func:`load_config`; neither a configuration nor a folder, or a folder that is not there.
    """
    from repbend_fast.config import load_config as load

    folder = None if isinstance(resume, bool) else own_path(resume)
    if config is None:
        if folder is None:
            raise UserError("neither a recipe nor the folder of a run to resume; name one of them")
        config = run_config(folder)
    settings = load(config, overrides, overlays=overlays)
    if resume is False:
        return settings, None
    folder = folder or Path(settings.output.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder to resume; train it from the start without resuming")
    settings.output.folder = str(folder)
    return settings, folder


def run_config(run: PathLike) -> Path:
    """The configuration that a run's folder holds.

    Raises:
        UserError: no such folder, or not the folder of a run.
    """
    from repbend_fast.runs.folder import RunFolder

    folder = own_path(run)
    if not folder.is_dir():
        raise UserError(f"{run}: no such folder; name the folder of a run")
    path = RunFolder(folder).config
    if not path.is_file():
        raise UserError(f"{run}: not the folder of a run, it holds no {path.name}")
    return path


def _of_the_first(say: Say | None) -> Say | None:
    """``say`` where this is the first of several processes, which speaks for all."""
    from repbend_fast.distributed.launch import launch

    return say if launch().number == 0 else None
