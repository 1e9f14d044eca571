"""Evaluation before and after a run, and of a run or a recipe by itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn

from repbend_fast.config import load_config
from repbend_fast.config.schema import Config
from repbend_fast.console import say, show
from repbend_fast.data.prompts import load_prompts
from repbend_fast.data.records import Sequence
from repbend_fast.data.settings import PromptsConfig
from repbend_fast.data.tokenize import ChatEncoder
from repbend_fast.errors import UserError, one_line
from repbend_fast.evaluation.chat import chat_statistics
from repbend_fast.evaluation.measure import run_evaluation
from repbend_fast.evaluation.rates import Side, table
from repbend_fast.models import attach_lora, find_decoder, load_model, load_tokenizer, lora_dropout, reference_model
from repbend_fast.models.causal import AdaptedLM, CausalLM
from repbend_fast.objectives import build_objective, roles_of
from repbend_fast.runs.folder import RunFolder, write_json
from repbend_fast.runs.prepare import RunData, prepare_data
from repbend_fast.runs.token_ids import check_token_ids
from repbend_fast.step import StreamRunner, checked_runner
from repbend_fast.step.levers import levers_of


@dataclass(frozen=True)
class Evaluation:
    """What was measured: ``before`` without an adapter, ``after`` with a run's, None for a recipe's model as it is.

    Each holds rates from 0 to 1 (``attack_direct``, ``attack_prefill``, ``helpful_ordinary``, …), with held-out chat
    ``perplexity`` and ``kl``, the answers in ``samples``, and how many there are in ``counts``.
    ``file``: the JSON that holds the same, if one was written.
    """

    before: Side
    after: Side | None = None
    file: Path | None = None


def evaluate_sides(
    run: RunFolder, config: Config, runner: StreamRunner, data: RunData, side: str, **extra: object
) -> None:
    """Measure the model as it is now and store it as ``side`` (``before`` or ``after``) of the run's
    ``evaluation.json``.

    Does nothing without ``evaluation.prompts``. ``after`` prints the table of both sides, and measures the model
    without its adapter where there is no ``before``.
    """
    if config.evaluation.prompts is None:
        return
    ranks = runner.ranks
    content = ranks.same(read_evaluation(run.evaluation) if side == "after" and ranks.first else {})
    if side == "after" and "before" not in content:
        with reference_model(runner.model):
            content["before"] = measure_model(config, runner, data.encoder, data.chat)
        if ranks.first:
            write_json(run.evaluation, content)
    content[side] = measure_model(config, runner, data.encoder, data.chat)
    if ranks.first:
        write_json(run.evaluation, content | extra)
    if side == "after":
        show(table(content.get("before"), content["after"]))


def drop_stale(run: RunFolder, config: Config) -> None:
    """Take out of ``evaluation.json`` what a resumed run cannot keep: ``after``, and ``before`` if it was measured with
    other settings.
    """
    stored = read_evaluation(run.evaluation)
    if not stored:
        return
    try:
        same = _measured(load_config(str(run.config))) == _measured(config)
    except UserError:
        same = False  # an older version's, or gone
    kept = {"before": stored["before"]} if same and "before" in stored else {}
    write_json(run.evaluation, kept)


def measure_model(
    config: Config, runner: StreamRunner, encoder: ChatEncoder, chat: list[Sequence]
) -> dict[str, object]:
    """Rates of generated answers, and perplexity and KL on held-out chat where there is some, in the precision of the
    run's passes; the runner's processes share the work.
    """
    with lora_dropout(runner.model, None), runner.autocasting():
        result = run_evaluation(runner.model, encoder, config.evaluation, runner.ranks).as_dict()
        if chat and runner.head is not None:
            statistics = chat_statistics(runner, chat)
            result |= {"perplexity": statistics.perplexity, "kl": statistics.kl}
    return result


def evaluate_target(config: Config, run: Path | None, out: Path | None) -> Evaluation:
    """Measure the adapter of a run's folder, or a recipe's model as it is. Shows a table, writes JSON.

    Measured as the run was, the result is the ``after`` of its ``evaluation.json``. With other prompts or settings the
    run's ``before`` is no comparison, so both sides are measured and stored apart, as ``evaluation-PROMPTS.json``.

    Raises:
        UserError: no adapter, prompts or data to read, or a file that cannot be written.
    """
    prompts = config.evaluation.prompts = config.evaluation.prompts or PromptsConfig()
    load_prompts(prompts)
    folder = RunFolder(run) if run else None
    if folder and not (folder.adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{run}: no adapter yet; resume the run with repbend-fast train --resume {run}")
    as_run = folder is not None and _measured(load_config(str(folder.config))) == _measured(config)
    content = read_evaluation(folder.evaluation) if folder and as_run else {}
    path = out
    if folder and path is None:
        path = folder.evaluation if as_run else folder.path / f"evaluation-{Path(prompts.path).stem}.json"
    data = prepare_data(config, load_tokenizer(config.model), roles_of(config.objective))
    base = load_model(config.model)
    check_token_ids(base, data)
    if "before" not in content:
        objective = build_objective(config.objective, find_decoder(base).num_blocks, config.training.steps)
        fresh = attach_lora(base, config.lora, (objective.last_state,))
        content["before"] = _measured_side(fresh, config, data)
        base = fresh.unload()
    if folder:
        content["after"] = _measured_side(_adapted(base, folder), config, data)
    show(table(content["before"], content.get("after")))
    if path is not None:
        write_json(path, content)
        say(f"wrote {path}")
    return Evaluation(content["before"], content.get("after"), path)


def _measured(config: Config) -> dict[str, object]:
    """The settings that decide what the numbers of an evaluation mean."""
    settings = config.model_dump(
        include={"model": True, "data": True, "training": {"autocast"}, "validation": {"every", "sources", "holdout"}}
    )
    return settings | config.evaluation.model_dump(exclude={"batch_size"})


def _adapted(base: CausalLM, folder: RunFolder) -> AdaptedLM:
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(cast(nn.Module, base), str(folder.adapter), is_trainable=True)
        return cast(AdaptedLM, adapted.eval())
    except Exception as error:  # peft takes settings as they are, and trips over one anywhere
        raise UserError(
            f"{folder.adapter}: not an adapter of this model ({one_line(error)}); resume the run to write it again"
        ) from error


def _measured_side(model: CausalLM, config: Config, data: RunData) -> dict[str, object]:
    runner = checked_runner(model, config, levers_of(config.memory, model), bool(data.chat))
    with runner.prepared:
        return measure_model(config, runner, data.encoder, data.chat)


def read_evaluation(path: Path) -> dict[str, Side]:
    """What an ``evaluation.json`` holds; nothing where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); remove it and evaluate again") from error
