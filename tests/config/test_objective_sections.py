"""The section ``objective``: its keys follow its name, wherever that is written, and mistakes stay one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from repbend_fast.config import Config, load_config, resolved_yaml
from repbend_fast.errors import UserError
from repbend_fast.objectives.circuit_breaker import CircuitBreakerConfig
from repbend_fast.objectives.crl import CRLConfig
from repbend_fast.objectives.custom import CustomObjectiveConfig
from repbend_fast.objectives.npo import NPOConfig
from repbend_fast.objectives.registry import SETTINGS
from repbend_fast.objectives.rmu import RMUConfig


def config(*overrides: str, recipe: str = "demo", overlays: str | tuple[str, ...] = ()) -> Config:
    return load_config(recipe, overrides, overlays=overlays, note=lambda text: None)


def message(*overrides: str, recipe: str = "demo") -> str:
    with pytest.raises(UserError) as caught:
        config(*overrides, recipe=recipe)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("circuit_breaker", CircuitBreakerConfig),
        ("rmu", RMUConfig),
        ("npo", NPOConfig),
        ("crl", CRLConfig),
        ("a.b:C", CustomObjectiveConfig),
    ],
)
def test_a_name_brings_its_own_section_and_drops_the_recipe_s(name: str, section: type) -> None:
    c = config(f"objective.name={name}")
    assert type(c.objective) is section
    assert c.objective == (section() if section is not CustomObjectiveConfig else CustomObjectiveConfig(name=name))


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.name=rmu", "objective.layer=5"),
        ("objective.layer=5", "objective.name=rmu"),
        ("layer=5", "objective.name=rmu"),
    ],
)
def test_the_order_of_overrides_does_not_matter(overrides: tuple[str, ...]) -> None:
    assert config(*overrides).objective == RMUConfig(layer=5)


def test_the_order_of_keys_in_a_file_does_not_matter(tmp_path: Path) -> None:
    recipe = write(tmp_path, "base: demo\nobjective:\n  retain: 7.0\n  name: rmu\n")
    assert config(recipe=recipe).objective == RMUConfig(retain=7.0)


def test_a_recipe_may_change_single_settings_of_its_base_s_objective() -> None:
    mistral, llama = (
        config(recipe=f"circuit-breaker-{name}").objective
        for name in ("mistral-7b-instruct-v0.2", "llama-3-8b-instruct")
    )
    assert (mistral.coefficient, llama.coefficient) == (5.0, 10.0)
    assert llama == mistral.model_copy(update={"coefficient": 10.0})


def test_settings_survive_being_written_and_read_back(tmp_path: Path) -> None:
    original = config("objective.name=my.module:Push", "objective.settings={layer: 2, weights: [1.0, 0.5]}")
    assert original.objective.settings == {"layer": 2, "weights": [1.0, 0.5]}
    assert config(recipe=write(tmp_path, resolved_yaml(original))) == original
    assert (
        config("objective.settings.layer=3", recipe=write(tmp_path, resolved_yaml(original))).objective.settings[
            "layer"
        ]
        == 3
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["objective.name=circuit_braker"],
            "must be one of " + ", ".join(SETTINGS) + ", or module:Class of your own",
        ),
        (["objective.name=circuit_braker"], "; did you mean circuit_breaker?"),
        (["objective.name=3"], "objective.name=3: must be one of repbend"),
        (["objective.name=a b:C"], "objective.name=a b:C: must be"),
        (["objective.name=rmu", "objective.layr=5"], "unknown key objective.layr; did you mean layer?"),
        (["objective.name=rmu", "objective.cosine=1"], "unknown key objective.cosine; allowed: name, layer,"),
        (["objective.layer=5"], "unknown key objective.layer; "),
        (["objective.name=rmu", "objective.layer=0"], "objective.layer=0: must be an integer of at least 1"),
        (
            ["objective.name=circuit_breaker", "objective.layers=[]"],
            "objective.layers=[]: must be a list of values, each an integer",
        ),
        (
            ["objective.name=circuit_breaker", "objective.layers=[a]"],
            'objective.layers=["a"]: must be a list of values, each an integer',
        ),
        (["objective.name=npo", "beta=0"], "beta=0: objective.beta must be a number of more than 0"),
        (["objective.name=npo", "--loss_beta=x"], "--loss_beta=x: objective.beta must be a number"),
        (
            ["objective.name=crl", "objective.safe=0", "objective.unsafe=0"],
            "objective.safe=0 with objective.unsafe=0: ",
        ),
        (["objective.name=crl", "objective.refusal=-1"], "objective.refusal=-1: must be a number of at least 0"),
        (["objective.name=rmu", "objective.refusal=1"], "unknown key objective.refusal; allowed: name, layer,"),
        (
            ["objective.recovery_share=1.5"],
            "objective.recovery_share=1.5: must be a number of at least 0 and at most 1",
        ),
        (["objective.recovery_tokens=-1"], "objective.recovery_tokens=-1: must be an integer of at least 0"),
        (
            ["objective.name=crl", "objective.loss_mode=prompt_last"],
            "objective.loss_mode=prompt_last: must be one of prompt_response,",
        ),
        (
            ["objective.name=rmu", "lora.blocks=[8, 9]"],
            "lora.blocks=[8, 9] lie behind the window, which ends at hidden state 8",
        ),
        (["steering_coeff=3"], "unknown key steering_coeff"),
    ],
)
def test_mistakes(overrides: list[str], expected: str) -> None:
    assert expected in message(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["cosine=0", "objective.unsafe=0"],
        ["objective.safe=0", "objective.unsafe=0", "cosine=0", "objective.kl=0"],
        ["objective.name=crl", "objective.safe=0", "objective.unsafe=0"],
    ],
)
def test_a_refusal_alone_is_a_training(overrides: list[str]) -> None:
    """It has a gradient while LoRA is at its start, so what is refused without it is not with it."""
    assert "objective.refusal" in message(*overrides, "objective.refusal=0")
    assert config(*overrides, "objective.refusal=30").objective.refusal == 30.0


def test_a_mistake_in_a_file_names_its_line(tmp_path: Path) -> None:
    recipe = write(tmp_path, "base: demo\nobjective:\n  name: npo\n  beta: -1.0\n")
    assert "recipe.yaml:4: objective.beta=-1.0: must be a number of more than 0" in message(recipe=recipe)
    recipe = write(tmp_path, "base: demo\nobjective:\n  name: npa\n")
    assert "recipe.yaml:3: objective.name=npa: must be one of repbend, circuit_breaker" in message(recipe=recipe)


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["objective.name=circuit_breaker", "--loss_alpha=7.0"], "coefficient", 7.0),
        (["objective.name=rmu", "--loss_alpha=7.0"], "retain", 7.0),
        (["objective.name=rmu", "--steering_coeff=7.0"], "coefficient", 7.0),
        (["objective.name=npo", "--loss_alpha=7.0"], "retain_nll", 7.0),
        (["objective.name=npo", "--loss_beta=7.0"], "beta", 7.0),
        (["objective.name=npo", "beta=7.0"], "beta", 7.0),
        (["objective.name=npo", "--loss_gamma=7.0"], "retain_kl", 7.0),
        (["objective.name=crl", "--loss_alpha=7.0"], "safe", 7.0),
        (["objective.name=crl", "--loss_epsilon=7.0"], "kl", 7.0),
        (["objective.name=crl", "--loss_margin_n=7.0"], "unsafe_margin", 7.0),
        (["--loss_beta=7.0"], "unsafe", 7.0),
    ],
)
def test_published_names_mean_what_they_mean_for_the_method(overrides: list[str], key: str, value: float) -> None:
    assert getattr(config(*overrides).objective, key) == value


def test_rmu_trains_down_proj_of_three_blocks_unless_told_otherwise(tmp_path: Path) -> None:
    base = "model: {name: M}\ndata: {sources: [x.jsonl]}\n"
    assert config(recipe=write(tmp_path, base)).lora.blocks == "to_window"
    c = config(recipe=write(tmp_path, base + "objective: {name: rmu}\n"))
    assert (c.lora.blocks, c.lora.target_modules) == ([5, 6, 7], ["down_proj"])
    assert config(recipe=write(tmp_path, base + "objective: {name: rmu, layer: 2}\n")).lora.blocks == [0, 1]
    c = config(recipe=write(tmp_path, base + "objective: {name: rmu}\nlora: {blocks: [4], r: 8}\n"))
    assert (c.lora.blocks, c.lora.target_modules, c.lora.r) == ([4], ["down_proj"], 8)


def test_published_recipes_of_the_other_methods() -> None:
    published = {
        "circuit-breaker": (150, 16, 1, 1e-4, CircuitBreakerConfig(coefficient=5.0, published_quirks=True)),
        "rmu": (150, 16, 1, 5e-5, RMUConfig(published_quirks=True)),
        "npo": (1000, 4, 4, 5e-5, NPOConfig(retain_nll=1.0, retain_kl=0.1, published_quirks=True)),
        "crl": (900, 4, 4, 1e-4, CRLConfig()),
    }
    for name, (steps, examples, accumulation, rate, objective) in published.items():
        c = config(recipe=f"{name}-mistral-7b-instruct-v0.2")
        t = c.training
        assert (t.steps, t.examples, t.accumulation, t.learning_rate, t.schedule) == (
            steps,
            examples,
            accumulation,
            rate,
            "constant",
        )
        assert c.objective == objective
        assert c.model.name == "mistralai/Mistral-7B-Instruct-v0.2"
        assert config(recipe=f"{name}-llama-3-8b-instruct").model.name == "meta-llama/Meta-Llama-3-8B-Instruct"
        for model in ("mistral-7b-instruct-v0.2", "llama-3-8b-instruct"):
            full, small = config(recipe=f"{name}-{model}"), config(recipe=f"{name}-{model}", overlays="qlora")
            assert (small.model.quantization, small.objective, small.lora) == ("nf4", full.objective, full.lora)
