"""A run on a model that breaks an assumption: it pads, it says so, or it stops with one line before the first step has
moved anything.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import TinyRun, rows, write_model, write_records
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, LlamaConfig

from repbend_fast.cli import main
from repbend_fast.errors import UserError
from repbend_fast.models import surgery
from repbend_fast.models.layers.lora import LowRankForward

OBJECTIVES = {
    "repbend": ("objective.window_start=2", "objective.window_size=2"),
    "circuit_breaker": ("objective.layers=[1, 2]",),
    "rmu": ("objective.layer=2",),
    "npo": (),
    "crl": ("objective.window_start=2", "objective.window_size=2"),
}
STEP = ("training.steps=1", "training.warmup_steps=0", "training.accumulation=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model: Path, tmp_path: Path) -> TinyRun:
    return TinyRun(model, tmp_path / "r")


def test_a_run_logs_what_was_shown(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.train(*STEP, "validation.every=0")
    assert "model checked: packed = alone, truncated = full" in capsys.readouterr().out
    (event,) = [row for row in rows(run.path, "event") if row["event"] == "model_checked"]
    assert event["packing"] == "on"
    assert {check["name"]: check["holds"] for check in event["checks"]} == dict.fromkeys(
        (
            "packed = alone",
            "truncated = full",
            "hidden states = transformers'",
            "head = logits",
            "padded = alone",
            "shared beginnings = own",
        ),
        True,
    )
    assert sum(kind["adapted"] for kind in event["coverage"]) > 0


def test_a_family_that_leaks_is_trained_padded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its validation reads the same perplexity with ``memory.packing=off``: both follow one decision."""
    # By transformers' own masks, which this family makes without looking at positions.
    monkeypatch.setattr(surgery, "use_varlen", lambda *arguments: None)
    folder = tmp_path / "gpt_oss"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = GptOssConfig(
        vocab_size=len(tokenizer),
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        initializer_range=0.2,
        pad_token_id=0,
        **shape,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    targets = "lora.target_modules=[q_proj, k_proj, v_proj, o_proj]"
    found = []
    for packing in ("auto", "off"):
        tiny = TinyRun(folder, tmp_path / packing)
        tiny.train(targets, *STEP, f"memory.packing={packing}")
        found.append([(row["kl"], row["perplexity"]) for row in rows(tiny.path, "validation")])
    assert found[0] == found[1]
    said = capsys.readouterr().out
    assert "padded instead" in said
    assert "mlp.experts.gate_up_proj" in said
    tiny = TinyRun(folder, tmp_path / "on")
    with pytest.raises(UserError, match=r"memory\.packing=on"):
        tiny.train(targets, "memory.packing=on")


@pytest.mark.parametrize("memory", [(), ("memory.piece_tokens=40", "memory.packing=off")])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_first_batch_that_is_not_at_zero_stops_the_run(run: TinyRun, objective: str, memory, monkeypatch) -> None:
    """A layer that computes otherwise where a gradient is wanted; a right one trains."""
    values = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    values["objective"] = {"name": objective}
    run.recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    settings = (*OBJECTIVES[objective], *STEP, "validation.every=0", *memory)
    run.train(*settings)
    forward = LowRankForward.forward

    def other(self, x, *args, **kwargs):
        result = forward(self, x, *args, **kwargs)
        return result * (1 + 2e-6) if torch.is_grad_enabled() else result

    monkeypatch.setattr(LowRankForward, "forward", other)
    with pytest.raises(
        UserError, match=r"step 1: before training .* (hidden state|KL).* must be exactly 0, and is"
    ) as caught:
        run.train(*settings)
    assert "\n" not in str(caught.value)
    assert not list(run.path.glob("checkpoints/step-*"))


def _with_token(model: Path, folder: Path, **tokens: str) -> Path:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens(tokens or {"additional_special_tokens": ["<|new|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def test_an_added_token_in_the_data_is_named_with_its_record(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = _with_token(model, tmp_path / "added")
    tiny = TinyRun(changed, tmp_path / "r")
    rows_before = LlamaConfig.from_pretrained(model).vocab_size
    tiny.train(*STEP, "validation.every=0")
    assert f"embedding has {rows_before} rows, and 1 of the tokenizer's ids are beyond it" in capsys.readouterr().out
    path = tiny.folder / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[5]["prompt"] += "<|new|>"
    write_records(path, records)
    with pytest.raises(UserError, match=rf"train\.jsonl.*6.*<\|new\|> has id {rows_before}, .*has {rows_before} rows"):
        tiny.train(*STEP, "validation.every=0")
    assert main(["data", "check", str(tiny.recipe)]) == 2
    assert "<|new|>" in capsys.readouterr().out


def test_a_pad_token_beyond_the_embedding_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = TinyRun(_with_token(model, tmp_path / "pad", pad_token="[PAD]"), tmp_path / "r")
    with pytest.raises(UserError, match=r"pad token \[PAD\] has id \d+, but the model's embedding has \d+ rows"):
        tiny.train(*STEP)
    assert main(["data", "check", str(tiny.recipe)]) == 2
    assert "[PAD]" in capsys.readouterr().err


def test_a_full_dry_run_prints_a_table_and_trains_nothing(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run=full", str(run.recipe)]) == 0
    said = capsys.readouterr().out
    for expected in ("packed = alone", "padded = alone", "truncated = full", "head = logits", "LlamaDecoderLayer"):
        assert expected in said
    assert not run.path.exists()


def test_wrong_targets_are_refused_before_weights_are_read(run: TinyRun, monkeypatch) -> None:
    monkeypatch.setattr("repbend_fast.training.trainer.load_model", lambda config: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="no layer named c_attn"):
        run.train("lora.target_modules=[c_attn]")
