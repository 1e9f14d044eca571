"""Overlays: settings that go on top of any recipe, and the folder that a recipe's name gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from open_recipes import NEEDED

from repbend_fast.cli import main
from repbend_fast.config import load_config, recipe_names, summary
from repbend_fast.config.shipped import OVERLAYS, overlay_names, recipe_folder
from repbend_fast.errors import UserError


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(recipe: str, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load_config(recipe, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_two_recipes_say_the_same() -> None:
    """A body is all but `base`, `with` and the folder; a recipe that is only another one with an overlay has none."""
    files = [*recipe_folder().glob("*.yaml"), *(recipe_folder() / OVERLAYS).glob("*.yaml")]
    said: dict[str, str] = {}
    for path in files:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
        below = (body.pop("base", None), body.pop("with", None))
        assert "output" not in body, path.name
        key = repr(body) if body else repr(below)
        assert key not in said, f"{path.name} and {said[key]}"
        said[key] = path.name
    assert len(said) == len(files) > 15


@pytest.mark.parametrize("name", recipe_names())
def test_a_run_s_folder_follows_its_recipe(name: str) -> None:
    needed = NEEDED.get(name, [])
    assert load_config(name, needed).output.folder == f"runs/{name}"
    assert load_config(name, needed, overlays="qlora").output.folder == f"runs/{name}-qlora"
    assert load_config(name, [*needed, "output.folder=mine"], overlays="qlora").output.folder == "mine"


def test_the_folder_of_a_file_is_its_own_and_not_its_base_s(tmp_path: Path) -> None:
    mine = write(tmp_path, "mine.v2.yaml", "base: demo\n")
    assert load_config(mine).output.folder == "runs/mine.v2"
    named = write(tmp_path, "named.yaml", "base: demo\noutput: {folder: here}\n")
    assert load_config(write(tmp_path, "on-top.yml", f"base: {named}\n")).output.folder == "here"


def test_overlays_go_on_top_of_the_recipe_and_below_the_overrides(tmp_path: Path) -> None:
    short = write(tmp_path, "short.yaml", "# Short.\ntraining:\n  steps: 9\n  learning_rate: 2e-5\n")
    shorter = write(tmp_path, "shorter.yaml", "steps: 7\n")
    c = load_config("demo", ["learning_rate=1e-4"], overlays=[short, shorter, "qlora"])
    assert (c.training.steps, c.training.learning_rate) == (7, 1e-4)
    assert (c.model.quantization, c.training.optimizer, c.output.folder) == (
        "nf4",
        "paged_adamw_8bit",
        "runs/demo-short-shorter-qlora",
    )
    assert load_config("demo", overlays=[shorter, short]).training.steps == 9


def test_a_recipe_names_its_overlays(tmp_path: Path) -> None:
    write(tmp_path, "short.yaml", "training: {steps: 5, learning_rate: 2e-5}\n")
    one = load_config(write(tmp_path, "one.yaml", "base: mistral-7b-instruct-v0.2\nwith: qlora\n"))
    assert (one.model.quantization, one.output.folder) == ("nf4", "runs/one")
    both = load_config(
        write(tmp_path, "both.yaml", "base: mistral-7b-instruct-v0.2\nwith: [qlora, short.yaml]\nlearning_rate: 1e-3\n")
    )
    assert (both.model.quantization, both.training.steps, both.training.learning_rate) == ("nf4", 5, 1e-3)
    inherited = load_config(write(tmp_path, "more.yaml", "base: both.yaml\nwith: llama-3-8b\n"))
    assert inherited.model.name == load_config("llama-3-8b-instruct").model.name
    assert (inherited.model.quantization, inherited.training.steps) == ("nf4", 5)


def test_the_old_names_end_in_what_to_write_instead(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    old = [name for name in recipe_names() if name.endswith(("mistral-7b-instruct-v0.2", "llama-3-8b-instruct"))]
    assert len(old) == 26
    for name in old:
        assert f"write {name} --with qlora (in a file base: {name} and with: qlora)" in message(f"{name}-qlora")
    assert "write llama-3-8b-instruct --with qlora" in message(
        write(tmp_path, "r.yaml", "base: llama-3-8b-instruct-qlora\n")
    )
    for command in (
        ["train"],
        ["eval"],
        ["plan"],
        ["compare"],
        ["data", "check"],
        ["recipes", "show"],
        ["recipes", "cp"],
    ):
        assert main([*command, "llama-3-8b-instruct-qlora"]) == 2
        assert "write llama-3-8b-instruct --with qlora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: demo\nwith: 3\n", "r.yaml:2: with=3: must be"),
        ("base: demo\nwith: [qlora, 3]\n", 'r.yaml:2: with=["qlora", 3]: must be'),
        ("base: demo\nwith: demo-rmu\n", "demo-rmu is a recipe, not an overlay"),
        ("base: demo\nwith: qlra\n", "no overlay is called qlra (a file's name ends in .yaml); did you mean qlora?"),
        ("base: demo\nwith: r.yaml\n", "r.yaml:1: base=demo: an overlay has no base"),
        ("with: r.yaml\n", "r.yaml:1: with=r.yaml: the recipes inherit from each other in a circle"),
        ("base: qlora\n", "qlora is an overlay, which goes on top of a recipe"),
        ("base: demo\nwith: qlora\nwith: qlora\n", "r.yaml:3: with is given twice"),
    ],
)
def test_what_is_no_overlay_is_one_line(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in message(write(tmp_path, "r.yaml", text))


def test_what_is_no_overlay_on_the_command_line() -> None:
    assert "qlora is an overlay, which goes on top of a recipe: write RECIPE --with qlora" in message("qlora")
    assert "demo is a recipe, not an overlay" in message("demo", overlays="demo")
    assert "no-such.yaml: no such file" in message("demo", overlays=["no-such.yaml"])
    assert "unknown key nonsense" in message("demo", overrides={"nonsense": 1}, overlays=["qlora"])


def test_overlays_are_listed_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "ls"]) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [words[1] for words in listed if words[0] == "--with"] == overlay_names()
    assert all(len(summary(name)) > 20 for name in overlay_names())
    assert main(["recipes", "show", "qlora"]) == 0
    assert "quantization: nf4" in capsys.readouterr().out
    assert main(["recipes", "cp", "qlora", str(tmp_path)]) == 0
    assert load_config("demo", overlays=str(tmp_path / "qlora.yaml")) == load_config("demo", overlays="qlora")


def test_every_command_with_overrides_takes_overlays(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["model.name=M", "gguf_file=null"]
    for words in (["--with", "qlora"], ["--with=qlora"]):
        assert main(["train", *words, "demo", *model, "--dry-run"]) == 0
        assert "quantization: nf4" in capsys.readouterr().out
    for command in (["train"], ["eval"], ["plan"], ["compare"], ["data", "check"]):
        assert main([*command, "demo", "--with", "qlra"]) == 2
        assert "did you mean qlora?" in capsys.readouterr().err
    assert main(["train", "demo", "--with"]) == 2
    assert "--with: expected one argument" in capsys.readouterr().err
