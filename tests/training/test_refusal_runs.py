"""Whole runs with the refusal term: trained, resumed to the bit, in the smallest budget, and refused where nothing
could be learnt.
"""

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
from tiny_run import TinyRun, adapter_of, records, reproducible, rows, same_tensors, write_records

from repbend_fast.errors import UserError
from repbend_fast.training.trainer import Trainer

OBJECTIVES: dict[str, dict[str, Any]] = {
    "repbend": {"window_start": 2, "window_size": 2},
    "repbend alone": {"window_start": 2, "window_size": 2, "safe": 0.0, "unsafe": 0.0, "cosine": 0.0, "kl": 0.0},
    "circuit_breaker": {"layers": [1, 2]},
    "crl": {"window_start": 2, "window_size": 2},
}
TERMS = {
    "repbend": {"safe", "unsafe", "cosine", "kl", "refusal"},
    "repbend alone": {"refusal"},
    "circuit_breaker": {"reroute", "retain", "refusal"},
    "crl": {"safe", "unsafe", "kl", "refusal"},
}
SHORT = ("training.steps=4", "training.checkpoint_every=2")


@pytest.fixture
def refusing(tiny: TinyRun):
    """``refusing(name)``: the tiny run with the objective and the refusal in its recipe."""

    def write(name: str) -> TinyRun:
        values = yaml.safe_load(tiny.recipe.read_text(encoding="utf-8"))
        values["objective"] = {"name": name.split()[0], **OBJECTIVES[name], "refusal": 30.0, "recovery_tokens": 5}
        tiny.recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
        return tiny

    return write


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Lengths of the refusal's sequences, micro-batch by micro-batch as they are trained on."""
    seen: list[list[int]] = []
    init = Trainer.__init__

    def watched(self: Trainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        streams = self.objective.streams

        def recorded(batch: Any, step: int) -> Any:
            found = streams(batch, step)
            seen.extend([len(s) for s in stream.sequences] for stream in found if stream.name == "refusal")
            return found

        self.objective.streams = recorded  # type: ignore[method-assign]

    monkeypatch.setattr(Trainer, "__init__", watched)
    return seen


def last_adapter(run: TinyRun) -> dict[str, torch.Tensor]:
    return load_file(run.path / "checkpoints" / "step-000004" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_and_its_resumption(name: str, refusing, lengths: list[list[int]], tmp_path: Path) -> None:
    run = refusing(name)
    assert run.train(*SHORT).exit_code == 0
    steps = rows(run.path, "step")
    assert all(row["terms"].keys() == TERMS[name] and math.isfinite(row["loss"]) for row in steps)
    assert steps[-1]["terms"]["refusal"] < steps[0]["terms"]["refusal"]
    validation = rows(run.path, "validation")[-1]
    assert all(value > 0 for layers in validation["distance"].values() for value in layers.values())

    # Only training draws: two micro-batches a step.
    assert len(lengths) == 8
    trained, whole = last_adapter(run), tmp_path / "whole"
    shutil.copytree(run.path, whole)
    shutil.rmtree(run.path / "checkpoints" / "step-000004")
    shutil.rmtree(run.path / "adapter")
    assert run.resume().exit_code == 0
    assert lengths[8:] == lengths[4:8]
    assert reproducible(run.path) == reproducible(whole)
    assert same_tensors(last_adapter(run), trained)
    assert same_tensors(adapter_of(run.path), adapter_of(whole))


def test_the_seed_of_the_run_decides_the_starts(refusing, lengths: list[list[int]]) -> None:
    """With one pair nothing else could: each micro-batch holds it alone."""
    run = refusing("repbend alone")
    pair = [row for row in records(count=1) if row["role"] == "pair"]
    write_records(run.folder / "train.jsonl", pair)
    alone = ("training.examples=1", "training.accumulation=1", "training.steps=12", "validation.every=0")
    drawn = []
    for seed in (1, 2, 1):
        lengths.clear()
        assert run.train(*alone, f"training.seed={seed}").exit_code == 0
        drawn.append(list(lengths))
    assert drawn[0] == drawn[2] != drawn[1]
    assert all(len({n for (n,) in lengths}) > 2 for lengths in drawn)


@pytest.mark.parametrize("name", ["repbend alone", "circuit_breaker"])
def test_a_run_in_the_smallest_budget(name: str, refusing, lengths: list[list[int]]) -> None:
    run = refusing(name)
    with pytest.raises(UserError, match="smallest that can") as refused:
        run.train(*SHORT, "memory.budget=10KB")
    (smallest,) = re.findall(r"smallest that can is ([\d.]+ ?[KMG]?B)", str(refused.value))
    assert run.train(*SHORT, f"memory.budget={smallest}").exit_code == 0
    under_budget, drawn = rows(run.path, "step"), list(lengths)
    lengths.clear()
    assert run.train(*SHORT).exit_code == 0
    assert lengths == drawn
    for key in ("loss", "grad_norm"):
        assert under_budget[0][key] == pytest.approx(rows(run.path, "step")[0][key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_pairs_one_line_names_the_remedy(name: str, refusing) -> None:
    run = refusing(name)
    write_records(run.folder / "train.jsonl", [row for row in records() if row["role"] != "pair"])
    with pytest.raises(UserError) as caught:
        run.train()
    text = str(caught.value)
    assert text.startswith(
        "objective.refusal=30 teaches the safe answers of `pair` records, and data.sources has none; add some"
    )
    assert text.endswith("or set objective.refusal=0")
    assert "\n" not in text


def test_pieces_of_the_refusal_s_stream_can_be_set_by_hand(refusing) -> None:
    run = refusing("repbend alone")
    assert run.train(*SHORT, "validation.every=0").exit_code == 0
    plain = rows(run.path, "step")
    assert run.train(*SHORT, "validation.every=0", "memory.piece_tokens={refusal: 30}").exit_code == 0
    assert rows(run.path, "step")[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
