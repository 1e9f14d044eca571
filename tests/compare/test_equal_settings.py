"""What may be compared with what: every setting that is not the method's own must be equal, and is named where it is
not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_comparison import InProcess, TinyComparison

from repbend_fast.cli import commands
from repbend_fast.cli.parser import parse
from repbend_fast.compare import DEFAULT_RECIPES, load_comparison
from repbend_fast.config import load_config
from repbend_fast.errors import UserError

RMU = {"name": "rmu", "layer": 2}


def differing(tiny: TinyComparison, **sections: object) -> str:
    other = tiny.other("other", objective=RMU, **sections)
    with pytest.raises(UserError) as caught:
        load_comparison([str(tiny.bend), str(other)])
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "values", "field", "remedy"),
    [
        ("training", {"steps": 6}, "training.steps: 4 and 6", "training.steps=4"),
        (
            "training",
            {"accumulation": 2},
            "training.accumulation: 2 and 4",
            "training.examples=2 training.accumulation=1",
        ),
        ("training", {"retain_examples": 6}, "training.retain_examples: null and 6", "training.retain_examples=null"),
        ("training", {"warmup_steps": 0}, "training.warmup_steps: 1 and 0", "training.warmup_steps=1"),
        ("model", {"dtype": "bfloat16"}, "model.dtype: float32 and bfloat16", "model.dtype=float32"),
        ("data", {"max_answer_tokens": 9}, "data.max_answer_tokens: 512 and 9", "data.max_answer_tokens=512"),
        ("validation", {"max_kl": 0.3}, "validation.max_kl: null and 0.3", "validation.max_kl=null"),
        ("evaluation", {"max_new_tokens": 9}, "evaluation.max_new_tokens: 4 and 9", "evaluation.max_new_tokens=4"),
        (
            "memory",
            {"checkpoint_blocks": "all"},
            "memory.checkpoint_blocks: auto and all",
            "memory.checkpoint_blocks=auto",
        ),
        ("lora", {"r": 8}, "lora.r: 4 and 8", "lora.r=4"),
    ],
)
def test_a_difference_names_field_recipes_values_and_remedy(
    section: str, values: dict, field: str, remedy: str, tiny: TinyComparison
) -> None:
    line = differing(tiny, **{section: values})
    assert line.startswith(f"{tiny.bend} and {tiny.folder / 'other.yaml'} differ in ")
    assert f"{field}; " in line
    assert line.endswith(f", such as {remedy}")


def test_other_data_is_a_difference(tiny: TinyComparison) -> None:
    assert "differ in data.sources: " in differing(tiny, data={"sources": [str(tiny.test_chat)]})


def test_the_methods_own_settings_and_the_split_of_the_batch_may_differ(tiny: TinyComparison) -> None:
    own = {"learning_rate": 0.5, "schedule": "linear", "decay_steps": 2, "seed": 9, "checkpoint_every": 1}
    own |= {"examples": 1, "accumulation": 2}
    other = tiny.other(
        "other",
        objective=RMU,
        training=own,
        lora={"target_modules": ["up_proj"], "blocks": [0]},
        output={"folder": "x"},
    )
    comparison = load_comparison([str(tiny.bend), str(other)])
    assert [m.name for m in comparison.methods] == ["repbend", "rmu"]


def test_overrides_go_to_every_recipe_and_mend_a_difference(tiny: TinyComparison) -> None:
    other = tiny.other("other", objective=RMU, training={"steps": 6})
    comparison = load_comparison([str(tiny.bend), str(other)], ["training.steps=5"])
    assert [m.config.training.steps for m in comparison.methods] == [5, 5]


def test_the_shipped_demo_recipes_can_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe in DEFAULT_RECIPES:
        monkeypatch.setattr("repbend_fast.compare.comparison.check_files", lambda config: None)
        load_config(recipe)
    comparison = load_comparison(DEFAULT_RECIPES)
    assert [m.name for m in comparison.methods] == ["repbend", "circuit_breaker", "rmu", "npo", "crl"]
    assert (comparison.seeds, comparison.rates, comparison.folder) == ((0,), (5e-4, 1e-3, 2e-3), Path("runs/compare"))


def test_two_recipes_of_one_objective_go_by_the_recipes_names(tiny: TinyComparison) -> None:
    other = tiny.other("stronger", objective={"name": "repbend", "window_start": 2, "window_size": 2, "unsafe": 2.0})
    assert [m.name for m in load_comparison([str(tiny.bend), str(other)]).methods] == ["bend", "stronger"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.learning_rate=0.5"], "training.learning_rate=0.5: here it comes from --rates"),
        (["training.seed=5"], "training.seed=5: here it comes from --seeds"),
        (["output.folder=x"], "output.folder=x: here it comes from --out"),
        (["validation.every=0"], "validation.every=0, but learning rates are chosen by validation"),
        (["validation.every=9"], "validation.every=9 is more than training.steps=4"),
        (["evaluation.prompts=null"], "evaluation.prompts=null, but methods are compared on test prompts"),
        (["evaluation.prompts.path=none.jsonl"], "evaluation.prompts.path=none.jsonl: no such file"),
        (["--rates", "0"], "--rates 0: must be above 0"),
        (["--seeds", "-1"], "--seeds -1: must be 0 or more"),
        (["--rates"], "--rates: no number follows"),
        (["--out"], "expected one argument"),
        (["--seeds", "0.5"], "invalid int value"),
    ],
)
def test_what_cannot_be_compared_is_one_line_before_anything_is_trained(
    arguments: list[str], message: str, tiny: TinyComparison, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.compare(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert in_process.commands == []
    assert not tiny.out.exists()


def test_bad_test_prompts_are_found_before_training(
    tiny: TinyComparison, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.test_prompts.write_text('{"kind": "attack"}\n', encoding="utf-8")
    assert tiny.compare() == 2
    assert "test.jsonl:1: unknown columns" in capsys.readouterr().err
    assert in_process.commands == []


def test_the_same_recipe_twice_is_one_line(tiny: TinyComparison) -> None:
    with pytest.raises(UserError, match="bend: two recipes of this name"):
        load_comparison([str(tiny.bend), str(tiny.bend)])


@pytest.mark.parametrize(
    "argv",
    [
        "compare a b --out d --seeds 0 1 --rates 1e-3 3e-3 steps=4",
        "compare --rates 1e-3 3e-3 a --seeds 0 1 b steps=4 --out=d",
        "compare --seeds=0 1 --rates=1e-3 3e-3 --out d a steps=4 b",
    ],
)
def test_options_recipes_and_overrides_in_any_order(argv: str) -> None:
    arguments = parse(argv.split())
    assert arguments.handler is commands.compare
    assert (arguments.recipes, arguments.overrides, arguments.out) == (["a", "b"], ["steps=4"], "d")
    assert (arguments.seeds, arguments.rates) == ([0, 1], [0.001, 0.003])
