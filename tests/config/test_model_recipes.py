"""The recipes for single models: what each says of its model fits the model's published shape."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from repbend_fast.config import load_config, recipe_names, recipe_text
from repbend_fast.config.schema import at_depth
from repbend_fast.planning.published_shapes import PUBLISHED_SHAPES

RECIPES = [name for name in recipe_names() if yaml.safe_load(recipe_text(name)).get("base") == "any"]
SOURCES = ["data.sources=mine.jsonl"]
WEIGHTS = {
    "gemma-2-2b-it": 2_614_341_888,
    "gemma-2-9b-it": 9_241_705_984,
    "gemma-3-1b-it": 999_885_952,
    "gemma-3-4b-it": 4_300_079_472,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "llama-3.2-1b-instruct": 1_235_814_400,
    "llama-3.2-3b-instruct": 3_212_749_824,
    "mistral-7b-instruct-v0.3": 7_248_023_552,
    "phi-3.5-mini-instruct": 3_821_079_552,
    "qwen2.5-1.5b-instruct": 1_543_714_304,
    "qwen2.5-7b-instruct": 7_615_616_512,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-1.7b-instruct": 1_711_376_384,
}
"""Weights as the model cards count them, tied ones once: a shape with a wrong size has another number."""


def test_every_recipe_for_a_model_is_known_here() -> None:
    assert sorted(WEIGHTS) == RECIPES


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_a_shape_has_the_published_number_of_weights_and_the_window_lies_as_deep(name: str) -> None:
    config = load_config(name, SOURCES)
    shape = AutoConfig.for_model(**PUBLISHED_SHAPES[config.model.name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    assert sum(p.numel() for p in model.parameters()) == WEIGHTS[name]
    depth = shape.get_text_config().num_hidden_layers
    auto = at_depth(load_config("any", [f"model.name={config.model.name}", *SOURCES]), depth)
    assert config.objective.window == auto.objective.window
    assert f"# {depth} blocks" in recipe_text(name)


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_a_recipe_that_nobody_has_run_says_so_first(name: str) -> None:
    assert "Nobody has run it yet" in recipe_text(name).split("\n", 1)[0]


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_a_recipe_for_a_model_changes_nothing_else(name: str) -> None:
    said = yaml.safe_load(recipe_text(name))
    assert set(said) <= {"base", "model", "objective", "data"}
    assert set(said["model"]) == {"name"}
    assert set(said["objective"]) == {"window_start", "window_size"}
    assert set(said.get("data", {})) <= {"chat_template_kwargs"}
