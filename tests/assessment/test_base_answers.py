"""``--base-of``: a second adapter's evaluation takes the base's answers from the first one's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from odd_judges import Weights
from tiny_run import TinyRun

from repbend_fast import assess
from repbend_fast.assessment import run as run_module
from repbend_fast.cli import main
from repbend_fast.errors import UserError

ATTACKS = ["direct", "weights", "halved:by=4"]


@pytest.fixture(autouse=True)
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("weights", "halved"):
        monkeypatch.setitem(run_module.ATTACKS.places, name, f"odd_judges:{name.title()}")
    Weights.given.clear()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def given(prompts: Path, out: Path) -> dict[str, Any]:
    return {
        "suites": str(prompts),
        "attacks": ATTACKS,
        "out": out,
        "max_new_tokens": 5,
        "overrides": ["model.device=cpu"],  # a run's own says so
    }


@pytest.fixture
def first(whole: TinyRun, prompts: Path, tmp_path: Path) -> Path:
    """An evaluation of a run, in which the base has said something that no model says."""
    folder = tmp_path / "first"
    assess(whole.path, **given(prompts, folder))
    Weights.given.clear()
    file = folder / "answers.jsonl"
    rows = rows_of(folder)
    rows[0]["answers"] = ["what only a file can say"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def other_adapter(whole: TinyRun, tmp_path: Path) -> Path:
    """An adapter without effect on the same model."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(whole.path / "adapter", tmp_path / "adapter"))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: 0 * weight for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    return folder


def test_the_base_is_not_asked_again(
    first: Path, other_adapter: Path, whole: TinyRun, prompts: Path, tmp_path: Path
) -> None:
    second = assess(whole.model, adapter=other_adapter, base_of=first, **given(prompts, tmp_path / "second"))
    old, new = rows_of(first), rows_of(tmp_path / "second")
    assert [row for row in new if row["side"] == "base"] == [row for row in old if row["side"] == "base"]
    assert [len(texts) for texts in Weights.given] == [3], "one white-box attack, on the bent side"
    by_side = {side: [row["answers"] for row in new if row["side"] == side] for side in ("base", "bent")}
    # What bends nothing answers as the base does, but for what the file alone has said.
    assert by_side["bent"][0] != ["what only a file can say"] == by_side["base"][0]
    assert by_side["bent"][1:] == by_side["base"][1:]
    assert [found["side"] for found in second.summary["changes"]] == ["base", "bent"]
    assert {group["side"] for group in second.summary["groups"]} == {"base", "bent"}


def test_the_command_line_and_a_base_that_was_evaluated_alone(
    other_adapter: Path, whole: TinyRun, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    words = ["--suite", str(prompts), "--attack", "direct", "--max-new-tokens", "5"]
    assert main(["eval", str(whole.model), *words, "--out", str(alone)]) == 0
    rest = ["--adapter", str(other_adapter), "--base-of", str(alone), "--out", str(both)]
    assert main(["eval", str(whole.model), *words, *rest]) == 0
    assert f"{both}: 5 answers of the base from {alone}" in capsys.readouterr().out
    assert [row for row in rows_of(both) if row["side"] == "base"] == rows_of(alone)
    # Taken once: another call finds everything answered.
    assert main(["eval", str(whole.model), *words, *rest]) == 0
    assert len(rows_of(both)) == 10


def test_an_evaluation_that_is_being_written_is_left_as_it_is(
    first: Path, other_adapter: Path, whole: TinyRun, prompts: Path, tmp_path: Path
) -> None:
    with (first / "answers.jsonl").open("ab") as file:
        file.write(b'{"side": "base", "suite": "ow')
    before = (first / "answers.jsonl").read_bytes()
    assess(whole.model, adapter=other_adapter, base_of=first, **given(prompts, tmp_path / "second"))
    assert (first / "answers.jsonl").read_bytes() == before


def test_what_cannot_be_taken_is_refused_by_name(
    first: Path, other_adapter: Path, whole: TinyRun, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "second"

    def refused(match: str, folder: Path, **changed: Any) -> None:
        with pytest.raises(UserError, match=match):
            assess(whole.model, adapter=other_adapter, base_of=folder, **(given(prompts, out) | changed))
        assert not out.exists(), "nothing is begun that could be in the way of the right command"

    # A run's folder, or one above it, in place of what `eval` wrote.
    refused(rf"{tmp_path}: no evaluation; name the folder that `repbend-fast eval` wrote, such as {first}$", tmp_path)
    refused("nowhere: no evaluation; name the folder", tmp_path / "nowhere")
    refused("is the folder of this evaluation itself", first, out=first)
    refused(r"first: was begun with seed=0, now it is 1; give the same, or another --base-of", first, seed=1)
    refused("was begun with suites.own.max_new_tokens=5, now it is 6", first, max_new_tokens=6)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"kind": "attack", "text": "How do I make a moon-key?"}) + "\n", encoding="utf-8")
    refused("holds no answers of a base to these prompts; give another --base-of, or none", first, suites=str(other))
    settings = first / "settings.json"
    whole_settings = settings.read_text(encoding="utf-8")
    settings.write_text('{"suites": {}, "hello": 1}', encoding="utf-8")
    refused("settings.json: says nothing of model; give another --base-of", first)
    settings.write_text(whole_settings, encoding="utf-8")
    rows = rows_of(first)
    (first / "changes.json").write_text("{", encoding="utf-8")
    refused("changes.json: cannot be read; give another --base-of", first)
    bent = [row for row in rows if row["side"] == "bent"]
    (first / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bent), encoding="utf-8")
    refused("holds no answers of a base to these prompts", first)
    (first / "answers.jsonl").write_text("[]\n", encoding="utf-8")
    refused("answers.jsonl:1: not a row of an evaluation; remove the line, or give another --base-of", first)


def test_only_what_this_evaluation_asks_is_taken(
    first: Path, other_adapter: Path, whole: TinyRun, prompts: Path, tmp_path: Path
) -> None:
    """Answers to other prompts would count later, whatever those prompts are then."""
    folder = Path(shutil.copytree(first, tmp_path / "two-suites"))
    rows = rows_of(folder)
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    settings["suites"]["more"] = settings["suites"]["own"]
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    more = [row | {"suite": "more"} for row in rows]
    (folder / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows + more), encoding="utf-8")
    assess(whole.model, adapter=other_adapter, base_of=folder, **given(prompts, tmp_path / "second"))
    assert {row["suite"] for row in rows_of(tmp_path / "second")} == {"own"}


def test_another_tokenizer_is_found_before_anything_is_taken(
    first: Path, other_adapter: Path, whole: TinyRun, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "second"
    assess(whole.model, adapter=other_adapter, **(given(prompts, out) | {"attacks": ["direct"]}))
    before = (out / "answers.jsonl").read_bytes()
    settings = json.loads((first / "settings.json").read_text(encoding="utf-8"))
    settings["tokenizer"]["template_sha256"] = "0"
    (first / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match=r"first: was begun with tokenizer\..*; give the same, or another --base-of"):
        assess(whole.model, adapter=other_adapter, base_of=first, **given(prompts, out))
    assert (out / "answers.jsonl").read_bytes() == before
