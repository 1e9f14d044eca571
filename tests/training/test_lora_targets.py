"""``lora.target_modules=auto``: names in what a run leaves, resuming by them, planning without weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from other_families import CONFIGS
from tiny_run import TinyRun, adapter_of, byte_tokenizer, reproducible, same_tensors

from repbend_fast.config import load_config
from repbend_fast.config.schema import LoraConfig, ModelConfig
from repbend_fast.errors import UserError
from repbend_fast.models.adapters import PUBLISHED
from repbend_fast.planning.shapes import shape_model
from repbend_fast.training.trainer import train

SHORT = ("training.steps=4", "validation.every=0")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "gpt2"
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.2,
        n_positions=512,
        pad_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(str(folder))
    return folder


def _names(run: TinyRun) -> tuple[list[str], set[str]]:
    config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    adapter = json.loads((run.path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    return config["lora"]["target_modules"], set(adapter["target_modules"])


def test_a_run_writes_the_names_and_resumes_by_them(gpt2: Path, tmp_path: Path) -> None:
    whole = TinyRun(gpt2, tmp_path / "whole")
    assert whole.config().lora.target_modules == "auto"
    whole.train(*SHORT)
    assert _names(whole) == (["c_attn", "c_fc", "c_proj"], {"c_attn", "c_fc", "c_proj"})
    assert all(".h." in name for name in adapter_of(whole.path))
    halves = TinyRun(gpt2, tmp_path / "halves")
    halves.train("training.steps=2", "validation.every=0")
    halves.resume("training.steps=4")
    assert reproducible(halves.path) == reproducible(whole.path)
    assert same_tensors(adapter_of(halves.path), adapter_of(whole.path))


def test_auto_in_the_recipe_goes_on_with_the_names_of_the_checkpoint(tiny: TinyRun) -> None:
    tiny.train("training.steps=2", "validation.every=0")
    assert _names(tiny) == ([*PUBLISHED], {*PUBLISHED})
    again = train(load_config(str(tiny.recipe), SHORT), tiny.path)
    assert again.exit_code == 0


def test_auto_does_not_go_on_from_a_checkpoint_with_fewer_layers(tiny: TinyRun) -> None:
    tiny.train("training.steps=2", "validation.every=0", "lora.target_modules=[q_proj]")
    with pytest.raises(UserError, match=r"lora\.target_modules=.*the checkpoint was written with \['q_proj'\]"):
        train(load_config(str(tiny.recipe), SHORT), tiny.path)


@pytest.mark.parametrize("targets", ["auto", ["q_proj", "in_proj"], ["q_proj"]])
def test_a_shallow_shape_of_a_hybrid_model_takes_the_names_that_it_has(targets, tmp_path: Path) -> None:
    """The attention of this one begins at block 2, so a planner's cut of two blocks has none."""
    name, values = CONFIGS["bamba"]
    shape = values | {"num_hidden_layers": 4, "attn_layer_indices": [2, 3]}
    getattr(transformers, name)(**shape).save_pretrained(str(tmp_path))
    model = ModelConfig(name=str(tmp_path), dtype="float32")
    whole = shape_model(model, LoraConfig(target_modules=targets), (4,))
    cut = shape_model(model, LoraConfig(target_modules=targets), (4,), 2)
    adapted = [
        {name.split(".lora_A")[0].rpartition(".")[2] for name, p in each.named_parameters() if "lora_A" in name}
        for each in (whole, cut)
    ]
    assert "q_proj" in adapted[0]
    assert "q_proj" not in adapted[1]
    assert "in_proj" in adapted[1]
