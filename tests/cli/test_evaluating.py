"""Which of its two measurements ``eval`` takes, and what it passes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repbend_fast import api
from repbend_fast.cli import main

Calls = list[tuple[str, str, Any, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found: Calls = []
    for name in ("assess", "evaluate"):
        monkeypatch.setattr(
            api,
            name,
            lambda target, overrides, _name=name, **given: found.append((_name, target, overrides, given)),
        )
    return found


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("config.yaml", "config.json", "adapter_config.json", "state.json", "model.gguf", "notes.txt"):
        folder = tmp_path / name.partition(".")[0] if name.startswith(("a", "s", "m", "n")) else tmp_path / name
        folder.mkdir()
        (folder / name).write_text("{}", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("target", ["config.yaml", "notes", "none"])
def test_without_the_four_options_a_run_is_measured_as_before(target: str, folders: Path, calls: Calls) -> None:
    words = ["evaluation.batch_size=2", "--limit", "3", "--seed=4", "--dtype", "float32"]
    assert main(["eval", str(folders / target), *words, "--out", "x.json"]) == 0
    [(name, _, overrides, given)] = calls
    assert (name, overrides, given["out"]) == ("evaluate", words, "x.json")


@pytest.mark.parametrize("target", ["demo", "mine.yaml", "llama-3-8b-instruct", "demoo"])
def test_and_so_is_a_recipe(target: str, calls: Calls) -> None:
    assert main(["eval", target]) == 0
    assert calls[0][0] == "evaluate"


@pytest.mark.parametrize("target", ["config.json", "adapter_config", "state", "model"])
def test_a_model_of_any_kind_is_assessed(target: str, folders: Path, calls: Calls) -> None:
    assert main(["eval", str(folders / target)]) == 0
    assert calls[0][:2] == ("assess", str(folders / target))


@pytest.mark.parametrize("target", ["owner/model", "package:some_model", "here/tiny.Q4_0.gguf"])
def test_and_so_is_one_that_is_not_here(target: str, calls: Calls) -> None:
    assert main(["eval", target]) == 0
    assert calls[0][:2] == ("assess", target)


@pytest.mark.parametrize("option", ["suite", "attack", "judge", "adapter"])
def test_each_of_the_four_options_asks_for_an_assessment(option: str, folders: Path, calls: Calls) -> None:
    assert main(["eval", str(folders / "config.yaml"), f"--{option}", "x"]) == 0
    assert calls[0][0] == "assess"


def test_everything_is_passed_on(folders: Path, calls: Calls) -> None:
    target = str(folders / "config.yaml")
    words = [
        "--suite",
        "harmbench:h.csv",
        "--suite=mine.jsonl",
        "--attack",
        "gcg:steps=64,candidates=64",
        "--judge",
        "rule",
    ]
    words += ["--attack=prefill", "--limit", "5", "--max-new-tokens=9", "--batch_size", "3", "--seed", "0"]
    words += [
        "--quantization",
        "nf4",
        "--dtype=float16",
        "model.attention=eager",
        "--with",
        "qlora",
        "--out",
        "o",
        "--adapter",
        "a",
        "--base-of",
        "b",
    ]
    assert main(["eval", *words[:3], target, *words[3:]]) == 0
    [(_, given_target, overrides, given)] = calls
    assert given_target == target
    assert overrides == ["model.quantization=nf4", "model.dtype=float16", "model.attention=eager"]
    assert given.pop("say") is not None
    assert given == {
        "adapter": "a",
        "suites": ["harmbench:h.csv", "mine.jsonl"],
        "attacks": ["gcg:steps=64,candidates=64", "prefill"],
        "judges": ["rule"],
        "limit": 5,
        "max_new_tokens": 9,
        "batch_size": 3,
        "seed": 0,
        "overlays": ["qlora"],
        "out": "o",
        "base_of": "b",
    }


@pytest.mark.parametrize("word", ["--limit=0", "--limit=x", "--batch-size=-1", "--max-new-tokens=1.5", "--seed=-1"])
def test_a_count_that_is_none_is_named(word: str, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "owner/model", word]) == 2
    assert capsys.readouterr().err.startswith(f"error: {word}: give a whole number from ")
    assert calls == []


def test_help_names_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    text = capsys.readouterr().out
    for word in (
        "--adapter",
        "--suite",
        "--attack",
        "--judge",
        "--limit",
        "--max-new-tokens",
        "--batch-size",
        "--seed",
    ):
        assert word in text
