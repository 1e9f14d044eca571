"""Two processes are one: every objective's terms, gradient and adapter, whole runs, and resuming with another number.

One launch of two processes (``tasks_of_two.everything``) does all of it; the tests compare it with one process.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bent_loop import RATE, gradient_by_hand, model_of
from kernel_compare import assert_matches
from objective_runs import ALL_CONFIGS
from safetensors.torch import load_file
from tasks_of_two import EVERY, HOW, WHOLE, five_steps, in_four_bits, steps_of
from tiny_run import TinyRun, events, rows
from two_processes import in_two

from repbend_fast.config import load_config
from repbend_fast.distributed.ranks import ALONE
from repbend_fast.objectives.registry import OBJECTIVES
from repbend_fast.training.checkpoint import adapter_weights
from repbend_fast.training.trainer import train

KINDS = ("attack", "ordinary", "borderline")
LAST = "step-000005"


def recipe_of(tiny_model: Path, folder: Path) -> TinyRun:
    """A recipe with the pair term, dropout, accumulation, and answers at validation and at both ends: of five prompts,
    which two processes cannot divide evenly.
    """
    run = TinyRun(tiny_model, folder)
    prompts = folder / "prompts.jsonl"
    lines = [{"text": f"Name a colour {i}.", "kind": KINDS[i % 3]} for i in range(5)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    values = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    values["validation"] |= {"prompts": {"path": str(prompts)}, "max_new_tokens": 4}
    values["evaluation"] = {"prompts": {"path": str(prompts)}, "max_new_tokens": 4, "batch_size": 2}
    values["training"]["steps"] = 5
    values["objective"]["pair"] = 0.3
    run.recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the run ``one`` of one process, and ``begun``, the same without its last step."""
    folder = tmp_path_factory.mktemp("several")
    run = recipe_of(tiny_model, folder)
    assert run.train(f"output.folder={folder / 'one'}").exit_code == 0
    shutil.copytree(folder / "one", folder / "begun")
    shutil.rmtree(folder / "begun" / "checkpoints" / LAST)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    return in_two(folder)


@pytest.mark.parametrize("name", EVERY)
def test_every_objective_in_two_processes(name: str, found) -> None:
    """Dropout on, streams cut into pieces that share passes where the base is whole, blocks recomputed; each process's
    terms are those of the whole batch.
    """
    alone = steps_of(name, ALONE, WHOLE)
    assert len({len(process["objectives"][how][name]["terms"]) for process in found for how in HOW}) == 1
    for how in HOW:
        for process in (process["objectives"][how][name] for process in found):
            assert process["terms"] == pytest.approx(alone["terms"], rel=1e-9, abs=1e-12), how
            assert_matches(process["gradient"], alone["gradient"], tolerance=1e-9)
            for parameter, values in alone["adapter"].items():
                torch.testing.assert_close(process["adapter"][parameter], values, rtol=1e-8, atol=1e-11)


def test_no_objective_is_left_out() -> None:
    assert {config.name for config in EVERY.values()} == set(OBJECTIVES)


def test_one_process_that_runs_out_of_memory_gives_way_alone(found) -> None:
    alone = five_steps(ALL_CONFIGS["repbend"], ALONE, WHOLE, steps=1)
    assert found[0]["retreats"]["pieces"] == {}
    assert len(found[1]["retreats"]["pieces"]) >= 2
    for process in found:
        assert process["retreats"]["terms"] == pytest.approx(alone["terms"], rel=1e-9, abs=1e-12)
        assert_matches(process["retreats"]["gradient"], alone["gradient"], tolerance=1e-9)


def test_a_base_in_four_bits_is_divided(found) -> None:
    alone = in_four_bits(ALONE)
    for process in found:
        assert process["nf4"]["terms"] == pytest.approx(alone["terms"], rel=1e-5, abs=1e-6)
        assert_matches(process["nf4"]["gradient"], alone["gradient"].double(), tolerance=1e-5)


def test_each_process_holds_its_part_of_the_blocks(found) -> None:
    for process in found:
        assert process["divided"] == {"adapter": 1.0, "blocks": 0.5, "ends": 1.0}


CLOCK = {"tokens_per_second", "seconds", "peak_memory_bytes"}


def leaves(value: object, name: str = "") -> dict[str, Any]:
    """Everything in nested dictionaries, by its path."""
    if not isinstance(value, dict):
        return {name: value}
    return {path: leaf for key, inner in value.items() for path, leaf in leaves(inner, f"{name}/{key}").items()}


def same_numbers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same to float32 accuracy, but for what a clock says."""
    ours, theirs = ({k: v for k, v in leaves(row).items() if k[1:] not in CLOCK} for row in (ours, theirs))
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        plain = isinstance(value, bool) or not isinstance(value, float | int)
        assert theirs[name] == (value if plain else pytest.approx(value, rel=2e-4, abs=2e-5)), name


def same_run(one: Path, other: Path) -> None:
    """Metrics, validations and the last adapter of two runs."""
    for kind in ("step", "validation"):
        ours, theirs = rows(one, kind), rows(other, kind)
        assert len(ours) == len(theirs) > 0
        for row, found in zip(ours, theirs):
            same_numbers(row, found)
    ours, theirs = (load_file(run / "checkpoints" / LAST / "adapter_model.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    moved = [torch.cat([w.flatten() for name, w in sorted(a.items()) if "lora_B" in name]) for a in (theirs, ours)]
    assert_matches(moved[0], moved[1].double(), tolerance=1e-3)


@pytest.mark.parametrize("name", ["two", "divided", "begun", "interrupted"])
def test_a_run_of_two_processes_is_the_run_of_one(name: str, folder: Path, found) -> None:
    """``begun`` went on from one process in two, ``interrupted`` was told to end in one of them."""
    same_run(folder / "one", folder / name)
    sides = [json.loads((folder / run / "evaluation.json").read_text(encoding="utf-8")) for run in ("one", name)]
    for side in ("before", "after"):
        same_numbers(sides[0][side], sides[1][side])


def test_what_two_processes_began_one_goes_on_with(folder: Path, found, capsys) -> None:
    run = folder / "on"
    shutil.copytree(folder / "two", run)
    shutil.rmtree(run / "checkpoints" / LAST)
    assert train(load_config(str(run / "config.yaml"), [f"output.folder={run}"]), run).exit_code == 0
    assert "processes 2 there, 1 here" in capsys.readouterr().out
    same_run(folder / "one", run)


def test_two_processes_end_together_where_one_is_told_to(folder: Path, found) -> None:
    for process in found:
        assert process["runs"]["resumed"] == 0
        assert process["runs"]["interrupted"] == [130, 0]
    (event,) = [row for row in rows(folder / "interrupted", "event") if row["event"] == "interrupted"]
    assert (event["step"], event["reason"]) == (3, "another process")


def test_the_first_process_alone_writes(folder: Path, found) -> None:
    for name in ("two", "divided"):
        assert [row["step"] for row in rows(folder / name, "step")] == [1, 2, 3, 4, 5]
        assert [row["event"] for row in events(folder / name)] == [row["event"] for row in events(folder / "one")]
        assert not list((folder / name).rglob("*.tmp"))


@pytest.mark.parametrize(("shard", "held"), [("none", 1.0), ("fsdp", 0.5)])
def test_a_loop_of_others_averages_both_losses(shard: str, held: float, folder: Path, found) -> None:
    """``DistributedDataParallel``, which transformers' Trainer wraps the model in; each process has its own records.
    With ``fsdp`` each holds a part of the base.
    """
    config = load_config(str(folder / "recipe.yaml"))
    start = adapter_weights(model_of(config))
    of_process = [gradient_by_hand(config, turn, 2) for turn in range(2)]
    for process in (each["loops"][shard] for each in found):
        moved = [(start[name] - process["adapter"][name]).flatten() / RATE for name in start]
        mean = [(of_process[0][name] + of_process[1][name]).flatten() / 2 for name in start]
        assert process["held"] == held
        assert_matches(torch.cat(moved), torch.cat(mean).double(), tolerance=1e-4)


def test_what_several_processes_refuse(found) -> None:
    for process in found:
        assert "has 1 sequences in a micro-batch, fewer than the 2 processes; raise training" in process["runs"]["few"]
        assert "have not the same configuration" in process["runs"]["apart"]
