"""Bad input to a whole run: one line, exit code 2, no weights loaded, nothing written, earlier runs as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import BLOCKS, TinyRun, write_model, write_records
from tiny_run import records as make_records

from repbend_fast.cli import main


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out
    return err


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repbend_fast.training.trainer.load_model", lambda config: pytest.fail("weights were loaded"))


PROBLEMS = {
    "window": (
        ["objective.window_start=3"],
        f"the window ends at hidden state 4, but this model has hidden states 0 … {BLOCKS}",
    ),
    "blocks": (["lora.blocks=[0, 7]"], f"lora.blocks=[0, 7]: the model has blocks 0 … {BLOCKS - 1}"),
    "model": (["model.name=./none"], "model.name=./none: no such folder"),
    "key": (["training.stepz=3"], "training.stepz"),
    "type": (["training.steps=many"], "training.steps=many"),
    "data": (["data.sources=none.jsonl"], "none.jsonl: no such file"),
    "validation prompts": (["validation.prompts.path=none.jsonl"], "none.jsonl: no such file"),
    "evaluation split": (["evaluation.prompts.split=nope"], "prompts.split=nope"),
    "paged": (
        ["training.optimizer=paged_adamw"],
        "training.optimizer=paged_adamw pages between GPU and CPU memory and needs CUDA",
    ),
    "paged 8 bit": (["training.optimizer=paged_adamw_8bit"], "use adamw or adamw_8bit"),
    "device": (["model.device=cuda:99"], "model.device=cuda:99"),
    "holdout": (["validation.sources=[]", "validation.holdout=4"], "validation.holdout=4 leaves no"),
    "one unsafe": (
        ["training.examples=1", "data.sources.0.roles=[safe, unsafe, retain]"],
        "training.examples=1: objective.cosine compares",
    ),
    "no retain": (["data.sources.0.roles=[safe, unsafe, pair]"], "no `retain` records"),
    "no safe, and pairs cannot stand in": (
        ["data.sources.0.roles=[unsafe, pair, retain]", "objective.loss_mode=prompt_last"],
        "no `safe` records",
    ),
    "an objective of pairs alone": (
        [
            "data.sources.0.roles=[safe, unsafe, retain]",
            "objective={name: 'refuse_and_reroute:RefuseAndReroute', settings: {layers: [2]}}",
        ],
        "no `pair` records",
    ),
    "tokens": (["data.max_prompt_tokens=3"], "data.max_prompt_tokens=3 leaves no room for a request"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.usefixtures("no_weights")
def test_bad_settings(
    problem: str, tiny: TinyRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    overrides, expected = PROBLEMS[problem]
    assert expected in fails(capsys, "train", str(tiny.recipe), *overrides)
    assert not tiny.path.exists()


@pytest.mark.usefixtures("no_weights")
def test_a_target_needs_attacks_to_measure_it(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tiny.folder / "questions.jsonl"
    questions.write_text('{"kind": "ordinary", "text": "How warm is tea?", "expected": ["hot"]}\n', encoding="utf-8")
    message = fails(
        capsys, "train", str(tiny.recipe), f"validation.prompts.path={questions}", "validation.target_attack=0.05"
    )
    assert "validation.target_attack=0.05: validation.prompts" in message
    assert "has no attacks" in message


@pytest.mark.usefixtures("no_weights")
def test_held_out_records_have_to_show_the_bending(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    held = write_records(
        tiny.folder / "kept.jsonl", [record for record in make_records(first=30, count=2) if record["role"] == "retain"]
    )
    message = fails(capsys, "train", str(tiny.recipe), f"validation.sources.0.path={held}")
    assert "validation.sources: no unsafe or pair records" in message


@pytest.mark.parametrize("problem", ["window", "blocks", "evaluation split", "paged"])
@pytest.mark.usefixtures("no_weights")
def test_an_earlier_run_stays_where_it_is(
    problem: str, whole: TinyRun, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole.path, tiny.path)
    before = {path: path.read_bytes() for path in tiny.path.rglob("*") if path.is_file()}
    fails(capsys, "train", str(tiny.recipe), *PROBLEMS[problem][0])
    assert {path: path.read_bytes() for path in tiny.path.rglob("*") if path.is_file()} == before
    assert not (tiny.folder / "run.1").exists()


RECORDS = {
    "empty prompt": ({"role": "safe", "prompt": " ", "answer": "a"}, "prompt"),
    "empty answer": ({"role": "safe", "prompt": "a", "answer": ""}, "answer"),
    "missing answer": ({"role": "unsafe", "prompt": "a"}, "answer"),
    "wrong type": ({"role": "retain", "messages": "hello"}, "messages"),
    "unknown role": ({"role": "sage", "prompt": "a", "answer": "b"}, "sage"),
}


@pytest.mark.parametrize("problem", RECORDS)
@pytest.mark.usefixtures("no_weights")
def test_a_bad_record_is_named_by_file_and_line(
    problem: str, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, named = RECORDS[problem]
    good = make_records()
    data = write_records(tiny.folder / "bad.jsonl", [*good[:4], bad, *good[4:]])
    error = fails(capsys, "train", str(tiny.recipe), f"data.sources.0.path={data}")
    assert f"{data}:5: " in error
    assert named in error
    assert not tiny.path.exists()


@pytest.mark.usefixtures("no_weights")
def test_invalid_text_and_json_are_named_by_file_and_line(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.folder / "bad.jsonl"
    line = json.dumps(make_records()[0]).encode()
    for bad, named in ((b'{"role": "safe", "prompt": "\xff"}', "invalid UTF-8"), (b'{"role": ', "invalid JSON")):
        data.write_bytes(line + b"\n" + bad + b"\n")
        error = fails(capsys, "train", str(tiny.recipe), f"data.sources.0.path={data}")
        assert f"{data}:2: {named}" in error


def test_skipped_records_are_counted_and_said(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_records(tiny.folder / "bad.jsonl", [*make_records(), {"role": "safe"}, {"role": "safe"}])
    overrides = [
        f"data.sources.0.path={data}",
        "data.skip_bad_records=true",
        "training.steps=1",
        "training.warmup_steps=0",
    ]
    assert main(["train", str(tiny.recipe), *overrides]) == 0
    out = capsys.readouterr().out
    assert f"records: 4 safe, 4 unsafe, 4 pair, 4 retain; skipped 2 bad records, the first at {data}:17" in out


def test_truncated_examples_are_counted_and_said(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tiny.recipe), "data.max_answer_tokens=6"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("truncated: ")]
    counts = {
        name: int(count) for count, name in (part.split() for part in line.removeprefix("truncated: ").split(", "))
    }
    assert counts["answers"] > 0
    assert counts["prompts"] == 0


@pytest.mark.usefixtures("no_weights")
def test_a_tokenizer_without_a_chat_template(
    tiny_model: Path, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tiny.folder / "plain", template=None)
    assert "has no chat template; set model.chat_template=FILE" in fails(
        capsys, "train", str(tiny.recipe), f"model.name={model}"
    )
    template = tiny.folder / "empty.jinja"
    template.write_text("hello", encoding="utf-8")
    error = fails(capsys, "train", str(tiny.recipe), f"model.name={model}", f"model.chat_template={template}")
    assert "chat template" in error
    assert not tiny.path.exists()


@pytest.mark.usefixtures("no_weights")
def test_a_model_folder_without_a_model(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tiny.folder / "empty"
    empty.mkdir()
    assert "holds no config.json" in fails(capsys, "train", str(tiny.recipe), f"model.name={empty}")


@pytest.mark.parametrize("damage", ["gone", "cut", "config"])
def test_damaged_weights_are_one_line(
    damage: str, tiny_model: Path, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tiny.folder / "model"))
    weights = model / "model.safetensors"
    if damage == "gone":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        (model / "config.json").write_text("{", encoding="utf-8")
    assert f"model.name={model}" in fails(capsys, "train", str(tiny.recipe), f"model.name={model}")
    assert not tiny.path.exists()


@pytest.mark.usefixtures("no_weights")
def test_an_output_folder_that_is_no_run(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.folder / "thesis"
    folder.mkdir()
    (folder / "chapter").write_text("text", encoding="utf-8")
    assert "exists and holds no run; choose another folder" in fails(
        capsys, "train", str(tiny.recipe), f"output.folder={folder}"
    )
    file = folder / "chapter"
    assert "is a file" in fails(capsys, "train", str(tiny.recipe), f"output.folder={file}")
    assert "not a folder" in fails(capsys, "train", str(tiny.recipe), f"output.folder={file / 'run'}")
    assert [path.name for path in folder.iterdir()] == ["chapter"]


@pytest.mark.parametrize("command", ["eval", "export", "report"])
def test_commands_on_what_is_no_run(command: str, tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no config.yaml" in fails(capsys, command, str(tiny.folder))
    assert fails(capsys, command, str(tiny.folder / "none"))


@pytest.mark.parametrize("command", ["eval", "export"])
def test_commands_on_a_run_without_an_adapter(
    command: str, whole: TinyRun, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole.path, tiny.path)
    shutil.rmtree(tiny.path / "adapter")
    assert f"no adapter yet; resume the run with repbend-fast train --resume {tiny.path}" in fails(
        capsys, command, str(tiny.path)
    )


def test_fewer_records_than_examples_are_noted(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_records(
        tiny.folder / "few.jsonl", [r for i, r in enumerate(make_records(count=3)) if i % 4 != 1 or i == 1]
    )
    tiny.train(
        f"data.sources={path}",
        "training.steps=2",
        "training.examples=3",
        "training.retain_examples=4",
        "training.refusal_examples=40",
        "validation.every=0",
    )
    notes = [line for line in capsys.readouterr().out.splitlines() if "more than once" in line]
    assert notes == [
        "training.examples=3, but there is 1 unsafe record: a micro-batch holds it more than once",
        "training.retain_examples=4, but there are 3 retain records: a micro-batch holds some of them more than once",
    ]
