"""Whole runs of each objective: in each precision with their resumption to the bit, and in the smallest budget."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import TinyRun, reproducible, rows, same_tensors, write_model

from repbend_fast.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"
ATTACKED = {"refusal": 1.0, "adversarial": {"weight": 0.5, "search_steps": 2}}
OBJECTIVES = {
    "repbend": {"window_start": 2, "window_size": 2},
    "circuit_breaker": {"layers": [1, 2]},
    "rmu": {"layer": 2},
    "npo": {"retain_kl": 0.1, "retain_nll": 0.5},
    "x_boundary": {"layers": [1, 2]},
    "undial": {"retain_kl": 0.1},
    "ce_u": {"retain_nll": 0.5},
    "lat": {"search_steps": 2, "distance_unit": "reference"},
    "crl": {"window_start": 2, "window_size": 2},
    "crl, cosine": {"window_start": 2, "window_size": 2, "distance": "cosine", "safe_margin": 0.3},
    "simnpo": {"retain_kl": 0.1},
    "wga": {},
    "sat_imp": {"retain_kl": 0.1},
    "repbend, attacked": {"window_start": 2, "window_size": 2, **ATTACKED},
    "circuit_breaker, attacked": {"layers": [1, 2], **ATTACKED},
    "x_boundary, attacked": {"layers": [1, 2], **ATTACKED},
    "crl, attacked": {"window_start": 2, "window_size": 2, **ATTACKED},
    "refuse_and_reroute:RefuseAndReroute": {"settings": {"layers": [2]}},
    "shorten_states:ShortenStates": {"settings": {"layers": [2]}},
}
PRECISIONS = {
    "float32": (),
    "bfloat16": ("model.dtype=bfloat16",),
    "nf4": ("model.dtype=bfloat16", "model.quantization=nf4"),
}
PLANNED_ALIKE = tuple(f"{name}, attacked" for name in ("circuit_breaker", "x_boundary", "crl"))
"""Perturbed copies cost a planner most; those of one method show what it makes of them."""
SHORT = ("training.steps=4", "training.checkpoint_every=2", "training.accumulation=1")


@pytest.fixture
def with_objective(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch):
    """``with_objective(name)``: the tiny run with the objective's settings in its recipe."""
    monkeypatch.chdir(EXAMPLES)

    def write(name: str) -> TinyRun:
        values = yaml.safe_load(tiny.recipe.read_text(encoding="utf-8"))
        values["objective"] = {"name": name.partition(",")[0], **OBJECTIVES[name]}
        tiny.recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
        return tiny

    return write


def last_adapter(run: TinyRun) -> dict[str, torch.Tensor]:
    """The adapter of the last checkpoint; the kept one may be the untrained one of the start."""
    return load_file(run.path / "checkpoints" / "step-000004" / "adapter_model.safetensors")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_and_its_resumption(name: str, precision: str, with_objective, tmp_path: Path) -> None:
    run = with_objective(name)
    # bitsandbytes quantises 64 weights of a row at a time.
    model = (f"model.name={write_model(tmp_path / 'wide', width=64)}",) if precision == "nf4" else ()
    assert run.train(*SHORT, *PRECISIONS[precision], *model).exit_code == 0
    steps = rows(run.path, "step")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in steps)
    assert any(float(t.abs().max()) > 0 for n, t in last_adapter(run).items() if "lora_B" in n)
    validation = rows(run.path, "validation")[-1]
    assert len(validation["distance"]) == 2
    assert all(value > 0 for layers in validation["distance"].values() for value in layers.values())

    trained, whole = last_adapter(run), tmp_path / "whole"
    shutil.copytree(run.path, whole)
    shutil.rmtree(run.path / "checkpoints" / "step-000004")
    shutil.rmtree(run.path / "adapter")
    assert run.resume().exit_code == 0
    assert reproducible(run.path) == reproducible(whole)
    assert same_tensors(last_adapter(run), trained)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in PLANNED_ALIKE])
def test_a_run_in_the_smallest_budget(name: str, with_objective, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("REPBEND_CACHE", str(tmp_path / "cache"))  # what is refused and what is kept measure the same
    run = with_objective(name)
    with pytest.raises(UserError, match="smallest that can") as refused:
        run.train(*SHORT, "memory.budget=10KB")
    (smallest,) = re.findall(r"smallest that can is ([\d.]+ ?[KMG]?B)", str(refused.value))
    assert run.train(*SHORT, f"memory.budget={smallest}").exit_code == 0
    (event,) = [row for row in rows(run.path, "event") if row["event"] == "memory_plan"]
    # RMU adapts so few matrices that recomputing a block of the tiny model need not save anything.
    assert event["levers"]["checkpoint_blocks"] > 0 or (name == "rmu" and event["levers"]["piece_tokens"])
    same_first_step(run, rows(run.path, "step"))


@pytest.mark.parametrize("name", PLANNED_ALIKE)
def test_an_attacked_run_with_the_least_of_each_lever(name: str, with_objective) -> None:
    run = with_objective(name)
    assert run.train(*SHORT, "memory.piece_tokens=1", "memory.checkpoint_blocks=3", "memory.packing=off").exit_code == 0
    under_levers = rows(run.path, "step")
    assert any(term.startswith("perturbed_") for term in under_levers[0]["terms"])
    same_first_step(run, under_levers)


def same_first_step(run: TinyRun, under_budget: list[dict[str, Any]]) -> None:
    """A run without limits begins with the same step."""
    assert run.train(*SHORT).exit_code == 0
    unlimited = rows(run.path, "step")
    assert len(under_budget) == len(unlimited) == 4
    # The first step alone: Adam makes steps of full size out of rounding where a gradient is 0, and runs part there.
    for key in ("loss", "grad_norm"):
        assert under_budget[0][key] == pytest.approx(unlimited[0][key], rel=1e-4, abs=1e-6)


def test_circuit_breakers_terms_follow_the_schedule(with_objective) -> None:
    """The loss of a row is its terms with that step's coefficients."""
    run = with_objective("circuit_breaker")
    assert run.train(*SHORT).exit_code == 0
    for row in rows(run.path, "step"):
        progress = row["step"] / (2 * 4)
        expected = 10 * (1 - progress) * row["terms"]["reroute"] + 10 * progress * row["terms"]["retain"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:X", "no_such_module cannot be imported (No module named 'no_such_module')"),
        ("refuse_and_reroute:Missing", "module refuse_and_reroute has no class Missing"),
        ("refuse_and_reroute:DEFAULTS", "has no class DEFAULTS"),
        ("pathlib:Path", "Path.roles must be a tuple of some of safe, unsafe, pair, retain"),
        ("broken_objective:X", "broken_objective cannot be imported (name 'nothing' is not defined)"),
        ("half_objective:Half", "Half has no method probes"),
    ],
)
def test_a_class_that_cannot_be_used(name: str, reason: str, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny.folder / "broken_objective.py").write_text("nothing\n", encoding="utf-8")
    (tiny.folder / "half_objective.py").write_text(
        "class Half:\n    roles = ('unsafe',)\n    streams = print\n", encoding="utf-8"
    )
    monkeypatch.chdir(EXAMPLES if name.startswith("refuse") else tiny.folder)
    with pytest.raises(UserError) as caught:
        tiny.train(f"objective.name={name}")
    assert str(caught.value).startswith(f"objective.name={name}: ")
    assert reason in str(caught.value)


def test_settings_of_an_own_objective_reach_it(with_objective) -> None:
    run = with_objective("refuse_and_reroute:RefuseAndReroute")
    with pytest.raises(UserError, match="unknown key lairs"):
        run.train("objective.settings.lairs=[1]")
    with pytest.raises(UserError, match=r"layers=\[9\]: this model has hidden states 0 … 3"):
        run.train("objective.settings.layers=[9]")


@pytest.mark.parametrize(
    ("name", "override", "key"),
    [
        ("circuit_breaker", "objective.layers=[1, 9]", "objective.layers"),
        ("rmu", "objective.layer=9", "objective.layer=9"),
        ("crl", "objective.window_start=9", "objective.window_start"),
    ],
)
def test_layers_beyond_the_model_are_refused_before_it_is_loaded(
    name: str, override: str, key: str, with_objective, monkeypatch
) -> None:
    run = with_objective(name)
    monkeypatch.setattr("repbend_fast.training.trainer.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="hidden states 0 … 3") as caught:
        run.train(override)
    assert key in str(caught.value)
