"""``repbend-fast plan``: what it prints for a model that is only a configuration file, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from repbend_fast.cli import main
from repbend_fast.cli.parser import parse


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(str(folder))
    settings = {
        "model": {"name": str(folder), "device": "cpu"},
        "objective": {"window_start": 2, "window_size": 1},
        "data": {"sources": [{"path": "demo"}], "max_prompt_tokens": 24, "max_answer_tokens": 24},
        "training": {"examples": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(path)


def test_options_stand_beside_overrides() -> None:
    arguments = parse(["plan", "demo", "memory.budget=2GB", "--card", "4060", "--json"])
    assert (arguments.recipe, arguments.card, arguments.json, arguments.table) == ("demo", "4060", True, False)
    assert arguments.overrides == ["memory.budget=2GB"]
    assert parse(["plan", "--table"]).recipe is None


def test_no_data_need_be_there_to_plan(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    assert main(["plan", recipe, "--json"]) == 0
    with_data = json.loads(capsys.readouterr().out)
    bare = Path(recipe).with_name("bare.yaml")
    settings["validation"] = {"sources": [{"path": "demo", "format": "demo"}]}  # which none of the data may be
    for sources in ({}, {"sources": None}, {"sources": []}):
        del settings["data"]["sources"]
        settings["data"] |= sources
        bare.write_text(yaml.safe_dump(settings), encoding="utf-8")
        assert main(["plan", str(bare), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["total_bytes"] == with_data["total_bytes"]
        settings["data"].setdefault("sources", None)
    del settings["data"]["sources"]
    bare.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["train", str(bare)]) == 2
    assert "data.sources is missing" in capsys.readouterr().err


def test_a_plan_in_words_and_as_json(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "memory.budget=60MB"]) == 0
    words = capsys.readouterr().out
    for part in (
        "planned, not measured",
        "base model",
        "adapter",
        "optimizer",
        "step, unsafe stream",
        "peak",
        "FLOPs",
        "limited by",
    ):
        assert part in words
    assert "tokens/s" not in words  # no time is promised for a CPU
    assert main(["plan", recipe, "--card", "4060", "--json"]) == 0
    shared = json.loads(capsys.readouterr().out)
    assert set(shared["stream_bytes"]) == {"merged"}  # so small a model's streams share their passes
    assert main(["plan", recipe, "--card", "4060", "--json", "memory.merge_streams=off"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert max(record["stream_bytes"].values()) < shared["stream_bytes"]["merged"]
    assert record["card"] == "RTX 4060 8 GB"
    assert record["budget_bytes"] == 8 * 10**9
    assert set(record["stream_bytes"]) == {"safe", "unsafe", "retain"}
    assert record["standing_bytes"]["weights"] + max(record["stream_bytes"].values()) < record["total_bytes"] < 10**9
    assert record["seconds_per_step"] > 0
    assert set(record["flops_per_step"]) == {"reference", "adapted", "backward", "head"}


def test_a_table_takes_settings_that_it_has_itself(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--table", "--json", "training.optimizer=adamw_8bit", "checkpoint_blocks=all"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["quantization"] for row in rows} == {"nf4", "none"}
    assert {row["levers"]["checkpoint_blocks"] for row in rows} == {3}
    assert main(["plan", recipe, "--table", "model.quantization=nf4"]) == 2
    assert "plan --table has both" in capsys.readouterr().err


def test_what_cannot_be_planned_is_one_line(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["plan"], "RECIPE is missing"),
        (["plan", recipe, "--card", "9999"], "--card 9999: not in the table"),
        (["plan", recipe, "memory.budget=lots"], "memory.budget=lots: not a size"),
        (["plan", recipe, "memory.budget=1MB"], "the smallest that can is"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
        assert error.count("\n") == 1
