"""Recipes, overrides and what comes out of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from open_recipes import NEEDED

from repbend_fast.config import Config, load_config, recipe_names, resolved_yaml, summary
from repbend_fast.errors import UserError


def config(*overrides: str, recipe: str = "demo", overlays: str | tuple[str, ...] = ()) -> Config:
    return load_config(recipe, overrides, overlays=overlays, note=lambda text: None)


def recipe_file(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


MINIMAL = "model:\n  name: M\ndata:\n  sources: [mine.jsonl]\n"


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_says_what_it_is(name: str) -> None:
    assert isinstance(load_config(name, NEEDED.get(name, [])), Config)
    assert len(summary(name)) > 20


@pytest.mark.parametrize("name", recipe_names())
def test_resolved_yaml_reads_back_equal(name: str, tmp_path: Path) -> None:
    overrides = (
        ["model.revision=1e5", "output.folder=2024-01-01", "learning_rate=1e-5"] if not name.startswith("demo") else []
    )
    original = load_config(name, [*overrides, *NEEDED.get(name, [])])
    assert load_config(recipe_file(tmp_path, resolved_yaml(original))) == original


def test_published_recipes_have_the_published_settings() -> None:
    mistral, llama = config(recipe="mistral-7b-instruct-v0.2"), config(recipe="llama-3-8b-instruct")
    assert (mistral.training.steps, llama.training.steps) == (300, 450)
    for recipe in (mistral, llama):
        o, t = recipe.objective, recipe.training
        assert (o.safe, o.unsafe, o.cosine, o.kl, o.pair) == (0.5, 0.5, 0.1, 0.3, 0.0)
        assert o.window == tuple(range(20, 31))
        assert (t.learning_rate, t.schedule, t.weight_decay, t.examples, t.accumulation) == (
            1e-5,
            "constant",
            0.0,
            4,
            4,
        )
        assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout, recipe.lora.blocks) == (
            16,
            16,
            0.05,
            "to_window",
        )
        assert (recipe.model.dtype, recipe.model.quantization) == ("bfloat16", "none")
        assert (recipe.data.max_prompt_tokens, recipe.data.max_answer_tokens, recipe.data.limit) == (512, 512, 10000)


@pytest.mark.parametrize("name", ["mistral-7b-instruct-v0.2", "llama-3-8b-instruct"])
def test_qlora_recipes_differ_only_in_quantisation_optimizer_memory_and_folder(name: str) -> None:
    full, small = config(recipe=name), config(recipe=name, overlays="qlora")
    assert (small.model.quantization, small.training.optimizer, small.memory.budget) == (
        "nf4",
        "paged_adamw_8bit",
        "auto",
    )
    small.model.quantization, small.training.optimizer, small.output.folder = "none", "adamw", full.output.folder
    small.memory = full.memory
    assert small == full


def test_overrides_take_dotted_bare_and_option_spellings() -> None:
    c = config(
        "training.steps=7", "quantization=nf4", "--seed", "3", "--learning-rate=1e-5", "clip_norm=null", "blocks=[0, 2]"
    )
    assert (c.training.steps, c.model.quantization, c.training.seed) == (7, "nf4", 3)
    assert (c.training.learning_rate, c.training.clip_norm, c.lora.blocks) == (1e-5, None, [0, 2])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("0.", 0.0), (".5", 0.5), ("2", 2.0), ("1.0e-05", 1e-5)]
)
def test_numbers_parse_as_numbers(text: str, value: float) -> None:
    assert config(f"objective.cosine={text}", "objective.pair=1").objective.cosine == value


def test_text_stays_as_written() -> None:
    c = config(
        "model.adapter=1e5", "output.folder=007", "model.chat_template=no: 'quote", "attention=true", "model.name=#1"
    )
    assert (c.model.adapter, c.output.folder, c.model.chat_template, c.model.attention) == (
        "1e5",
        "007",
        "no: 'quote",
        "true",
    )
    assert c.model.name == "#1"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (r'"\n\n"', "\n\n"),
        ("'1e5'", "1e5"),
        ("'it''s'", "it's"),
        ('"null"', "null"),
        ('""', ""),
        ('"a" or "b"', '"a" or "b"'),
        ('"a" # b', '"a" # b'),
        ('"a" # "b"', '"a" # "b"'),
        ("'a' # it'", "'a' # it'"),
        ("it's", "it's"),
        ('"', '"'),
    ],
)
def test_quotes_around_a_text_are_yamls_as_in_a_recipe(typed: str, expected: str) -> None:
    assert config(f"objective.recovery_separator={typed}").objective.recovery_separator == expected  # type: ignore[union-attr]
    assert config("--recovery-separator", typed).objective.recovery_separator == expected  # type: ignore[union-attr]


def test_a_target_waits_while_validation_is_off() -> None:
    assert (
        config("validation.every=0", "validation.prompts=null", "validation.target_attack=0.1").validation.target_attack
        == 0.1
    )


def test_null_clears_optional_text_and_sections() -> None:
    c = config("gguf_file=null", "validation.prompts=null", "validation.target_attack=null")
    assert c.model.gguf_file is None
    assert c.validation.prompts is None


def test_a_section_can_be_given_again_after_null_and_as_a_mapping() -> None:
    assert config("validation.prompts={limit: 4}").validation.prompts.split == "validation"  # type: ignore[union-attr]
    assert config("evaluation.prompts.limit=3").evaluation.prompts.limit == 3  # type: ignore[union-attr]


def test_home_is_expanded() -> None:
    assert config("output.folder=~/runs/x").output.folder == str(Path.home() / "runs/x")
    assert config("data.sources=~/mine.jsonl").data.sources[0].path == str(Path.home() / "mine.jsonl")


def test_sources_have_a_short_form_and_can_be_addressed() -> None:
    c = config("data.sources=mine.jsonl")
    assert [(s.path, s.format) for s in c.data.sources] == [("mine.jsonl", "auto")]
    c = config("data.sources=[a.jsonl, {path: b.json, format: circuit_breakers}]", "data.sources.0.limit=5")
    assert [(s.path, s.limit) for s in c.data.sources] == [("a.jsonl", 5), ("b.json", None)]
    c = config("data.sources.ultrachat.limit=9", recipe="mistral-7b-instruct-v0.2")
    assert [s.limit for s in c.data.sources] == [None, None, 9]


def test_base_is_inherited_deeply_and_lists_are_replaced(tmp_path: Path) -> None:
    c = load_config(recipe_file(tmp_path, "base: demo\ntraining:\n  steps: 4\ndata:\n  sources: [mine.jsonl]\n"))
    assert (c.training.steps, c.training.examples) == (4, config().training.examples)
    assert [s.path for s in c.data.sources] == ["mine.jsonl"]


def test_base_may_be_a_file_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "common.yaml").write_text(MINIMAL, encoding="utf-8")
    assert load_config(recipe_file(tmp_path, "base: common.yaml\nsteps: 3\n")).training.steps == 3


def test_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.yaml:1: base=mine\.yaml: .*circle"):
        load_config(recipe_file(tmp_path, "base: mine.yaml\n"))


def test_published_and_bare_names_are_keys_of_a_file_too(tmp_path: Path) -> None:
    text = (
        MINIMAL + "alpha: 0.25\nmax_step: 8\nobjective:\n  beta: 0.75\n  loss_mode: request_all\nlora:\n  alpha: 32\n"
    )
    c = load_config(recipe_file(tmp_path, text))
    assert (c.objective.safe, c.objective.unsafe, c.training.steps) == (0.25, 0.75, 8)
    assert (c.objective.loss_mode, c.lora.alpha) == ("prompt_all", 32)


def test_assignment_after_loading_is_validated() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        config().training.steps = 0
