"""Parity with recorded values of the published implementations (``repbend-fast verify DIR``).

A golden folder holds ``base_model/``, ``adapter/`` (non-zero B), ``batch.*.json`` (token ids), ``expected.json`` (loss
and gradient norm per case), ``grads.<case>.safetensors`` and optionally ``trajectory.json``. Architecture, window and
adapter come from the folder; everything is computed by the product's own objective and step, in float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from repbend_fast.config.schema import MemoryConfig, ModelConfig
from repbend_fast.console import say, show
from repbend_fast.errors import UserError
from repbend_fast.models import find_decoder, load_model, prepared, trainable_parameters
from repbend_fast.models.causal import AdaptedLM, CausalLM
from repbend_fast.objectives import build_objective
from repbend_fast.objectives.sections import Entry
from repbend_fast.step import StreamRunner
from repbend_fast.step.levers import levers_of
from repbend_fast.verify.golden import FORM, READERS, Case, form_of, objective_of, read_case, read_json

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
_TABLE_WIDTH = 120


@dataclass(frozen=True)
class Check:
    """One compared value.

    ``loss_error`` is relative to Σ |weight × term|: the terms of a combined loss cancel, and a sum near zero has no
    relative precision of its own (the exact float64 value of one recorded case lies 1.4e-5 of the sum away from the
    float32 record). For a single term this is the plain relative error. ``gradient_error`` is the relative L2 error of
    the full gradient where one is recorded (``whole_gradient``), else that of its norm, which sees neither signs nor
    the order of rows.
    """

    key: str
    expected: float
    got: float
    loss_error: float
    gradient_error: float
    whole_gradient: bool = False

    @property
    def passed(self) -> bool:
        return self.loss_error <= LOSS_TOLERANCE and self.gradient_error <= GRADIENT_TOLERANCE


@dataclass(frozen=True)
class Verification:
    """All checks of a folder, the keys of cases whose objective does not exist here, and the objectives that were
    checked.
    """

    checks: list[Check]
    unsupported: dict[str, list[str]]
    objectives: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(c.passed for c in self.checks)


def verify_folder(folder: Path, memory: MemoryConfig | None = None) -> Verification:
    """Compute every supported case of a golden folder.

    Raises:
        UserError: the folder is not a golden folder.
    """
    path = folder / "expected.json"
    expected = read_json(path)
    with form_of(path):
        by_objective: dict[str, list[Entry]] = {}
        for case in expected["cases"]:
            by_objective.setdefault(objective_of(case), []).append(case)
        supported = [case for name in READERS for case in by_objective.get(name, ())]
        unsupported = {
            name: [case["key"] for case in found] for name, found in by_objective.items() if name not in READERS
        }
        cases = [read_case(folder, case["key"], case, case, expected) for case in supported]
    checks: list[Check] = []
    memory = memory or MemoryConfig()
    if cases:
        model = _load(folder)
        checks = [_check_case(folder, model, case, memory) for case in cases]
    if (folder / "trajectory.json").is_file():
        checks += _check_trajectory(folder, expected, memory)
    return Verification(checks, unsupported, tuple(name for name in READERS if name in by_objective))


def run_verify(folder: Path, objectives: list[str] | None = None) -> int:
    """Print a table of all checks; exit code 0 only if there were any and every one passed.

    Cases of objectives that are not supported are listed. An objective in ``objectives`` of which no case was checked
    fails.
    """
    from rich.table import Table

    verification = verify_folder(folder)
    table = Table("case", "expected", "got", "loss error", "gradient error", "")
    for check in verification.checks:
        mark = "[green]ok[/]" if check.passed else "[red]FAIL[/]"
        gradient = f"{check.gradient_error:.1e}{'' if check.whole_gradient else ' (norm)'}"
        table.add_row(check.key, f"{check.expected:.6f}", f"{check.got:.6f}", f"{check.loss_error:.1e}", gradient, mark)
    if verification.checks:
        show(table, width=_TABLE_WIDTH)
        good = sum(c.passed for c in verification.checks)
        say(
            f"{good} of {len(verification.checks)} within {LOSS_TOLERANCE:g} (loss) and {GRADIENT_TOLERANCE:g} "
            "(gradient)"
        )
    for key in (key for keys in verification.unsupported.values() for key in keys):
        say(f"not supported: {key}")
    absent = [name for name in objectives or () if name not in verification.objectives]
    for name in absent:
        say(f"no case was checked for objective {name}")
    if not verification.checks:
        say(f"nothing was checked: {folder} has no case of an objective that exists here ({', '.join(READERS)})")
    return 0 if verification.passed and not absent else 1


def _check_case(folder: Path, model: CausalLM, case: Case, memory: MemoryConfig) -> Check:
    model.zero_grad(set_to_none=True)
    loss, scale = _loss_and_gradient(model, case, memory)
    gradient = _gradient(model)
    recorded = folder / f"grads.{case.key}.safetensors"
    whole = recorded.is_file()
    if whole:
        from safetensors.torch import load_file

        with _reading_tensors(recorded):
            gradient_error = _gradient_error(gradient, load_file(recorded))
    else:
        gradient_error = _relative(_norm(gradient), case.grad_norm)
    return Check(case.key, case.loss, loss, _relative(loss, case.loss, scale), gradient_error, whole)


@contextmanager
def _reading_tensors(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, or a pointer to a file that was not fetched ({error}); {FORM}") from error


def _check_trajectory(folder: Path, expected: dict[str, object], memory: MemoryConfig) -> list[Check]:
    path = folder / "trajectory.json"
    recorded = read_json(path)
    model = _load(folder)
    with form_of(path):
        optimizer = torch.optim.AdamW(
            trainable_parameters(model),
            lr=recorded["lr"],
            betas=tuple(recorded["betas"]),
            eps=recorded["eps"],
            weight_decay=recorded["weight_decay"],
        )
        steps = [
            read_case(folder, f"trajectory.{step['step']}", step, recorded, expected) for step in recorded["steps"]
        ]
        if not steps:
            raise ValueError("no steps")
    checks = []
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        loss, scale = _loss_and_gradient(model, step, memory)
        norm = _norm(_gradient(model))
        optimizer.step()
        checks.append(
            Check(step.key, step.loss, loss, _relative(loss, step.loss, scale), _relative(norm, step.grad_norm))
        )
    return checks


def _loss_and_gradient(model: CausalLM, case: Case, memory: MemoryConfig) -> tuple[float, float]:
    """The loss, and Σ |weight × term| as its scale; gradients are left in the model."""
    objective = build_objective(case.config, find_decoder(model).num_blocks, case.steps)
    levers = levers_of(memory, model)
    loss = scale = 0.0
    # Recorded values are of an evaluated model, whatever dropout its adapter was trained with.
    with prepared(model, levers, dropout=0.0) as ready:
        runner = StreamRunner(ready, levers, uses_head=objective.uses_head)
        for stream in objective.streams(case.batch, case.step):
            result = runner.backward(stream, dropout_seed=0)
            loss += float(result.loss)
            scale += sum(abs(weight * float(result.terms[name])) for name, weight in stream.weights.items())
    return loss, scale


def _load(folder: Path) -> AdaptedLM:
    from peft import PeftModel

    weights = folder / "adapter" / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder}: no adapter/adapter_model.safetensors; {FORM}")
    base = load_model(ModelConfig(name=str((folder / "base_model").resolve()), dtype="float32", device="cpu"))
    with _reading_tensors(weights):
        adapted = PeftModel.from_pretrained(cast(nn.Module, base), str(folder / "adapter"), is_trainable=True)
        return cast(AdaptedLM, adapted.eval())


def _gradient(model: CausalLM) -> dict[str, Tensor]:
    return {
        n: (torch.zeros_like(p) if p.grad is None else p.grad) for n, p in model.named_parameters() if p.requires_grad
    }


def _gradient_error(got: dict[str, Tensor], recorded: dict[str, Tensor]) -> float:
    if got.keys() != recorded.keys():
        return float("inf")
    difference = sum((got[k].double() - v.double()).square().sum() for k, v in recorded.items())
    return float((difference / sum(v.double().square().sum() for v in recorded.values())) ** 0.5)


def _norm(gradient: dict[str, Tensor]) -> float:
    return float(sum(g.double().square().sum() for g in gradient.values()) ** 0.5)


def _relative(got: float, expected: float, scale: float = 0.0) -> float:
    """The error relative to the larger of ``expected`` and ``scale``; two zeros agree."""
    return abs(got - expected) / max(abs(expected), scale, 1e-12)
