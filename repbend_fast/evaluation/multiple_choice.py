"""Multiple-choice scores through ``lm-eval``, an extra (``pip install 'repbend-fast[lm-eval]'``)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from types import ModuleType

import yaml

from repbend_fast.data.tokenizer import Tokenizer
from repbend_fast.errors import UserError, one_line
from repbend_fast.models.causal import CausalLM
from repbend_fast.models.decoder import causal_model
from repbend_fast.models.layers.switches import evaluation_mode
from repbend_fast.nearby import own_path


def multiple_choice(
    model: CausalLM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    few_shot: int | None = None,
    chat_template: bool = False,
) -> dict[str, dict[str, float]]:
    """Metrics by task, as ``lm-eval`` names them (``acc,none``), of a model as it is, with its adapter if it has one.

    Args:
        tasks: names of ``lm-eval``'s tasks, which read their data from the hub, and YAML files of your own, which may
            read local files.
        limit: at most this many questions of each task; None = all.
        few_shot: worked examples in front of each question; None = the task's own number.
        chat_template: ask through the tokenizer's chat template.

    Raises:
        UserError: ``lm-eval`` is not installed, there is no such task, or its data cannot be read.
    """
    evaluator, manager, huggingface = _lm_eval()
    files = [own_path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UserError(f"task {missing[0]}: no such file; give a YAML file, or a name that `lm-eval ls tasks` lists")
    causal = causal_model(model)
    # LoRA lives inside the modules, so the model within the peft wrapper has it.
    wrapped = huggingface.HFLM(pretrained=causal, tokenizer=tokenizer, batch_size=batch_size)
    try:
        with evaluation_mode(causal):
            found = evaluator.simple_evaluate(
                model=wrapped,
                tasks=[str(own_path(task)) if task.endswith((".yaml", ".yml")) else task for task in tasks],
                task_manager=manager.TaskManager(include_path=sorted({str(file.parent) for file in files}) or None),
                num_fewshot=few_shot,
                limit=limit,
                apply_chat_template=chat_template,
                log_samples=False,
                bootstrap_iters=0,
            )
    except (KeyError, ValueError, OSError, ImportError, yaml.YAMLError) as error:
        raise UserError(
            f"lm-eval could not run {', '.join(tasks)} ({one_line(error)}); check the tasks' names and, offline, that "
            "their data is local"
        ) from error
    return {task: _numbers(metrics) for task, metrics in (found or {}).get("results", {}).items()}


def _lm_eval() -> tuple[ModuleType, ModuleType, ModuleType]:
    names = ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface")
    try:
        evaluator, manager, huggingface = (importlib.import_module(name) for name in names)
    except ImportError as error:
        raise UserError(
            f"multiple choice needs lm-eval, which cannot be imported ({one_line(error)}); "
            "pip install 'repbend-fast[lm-eval]'"
        ) from error
    return evaluator, manager, huggingface


def _numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """The metrics that are numbers; ``alias`` and errors that were not computed (``N/A``) are none."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
