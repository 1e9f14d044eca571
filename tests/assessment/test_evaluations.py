"""Evaluations from end to end: every kind of model, rows and summary, going on after a kill, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from odd_judges import Absent, Weights
from tiny_run import TinyRun

from repbend_fast import assess
from repbend_fast.assessment import run as run_module
from repbend_fast.assessment.target import find_subject
from repbend_fast.cli import main
from repbend_fast.errors import UserError
from repbend_fast.evaluation.judges import known as known_judges
from repbend_fast.runs.folder import RunFolder

Rows = list[dict[str, Any]]


def rows_of(folder: Path) -> Rows:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["side"], row["suite"], row["attack"], row["index"]


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known_judges.PLACES, "absent", "odd_judges:Absent")
    monkeypatch.setitem(run_module.ATTACKS.places, "weights", "odd_judges:Weights")
    monkeypatch.setitem(run_module.ATTACKS.places, "halved", "odd_judges:Halved")
    Absent.asked.clear()
    Weights.given.clear()


@pytest.fixture(scope="module")
def evaluated(whole: TinyRun, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    arguments = ["--suite", str(prompts), "--attack", "direct", "--attack", "prefill", "--out", str(out)]
    assert main(["eval", str(whole.path), *arguments, "--max-new-tokens", "5", "--batch_size=2"]) == 0
    return out


def test_a_run_is_asked_on_both_sides(evaluated: Path, whole: TinyRun, prompts: Path) -> None:
    rows = rows_of(evaluated)
    assert [key(row) for row in rows] == [
        (side, "own", attack, index)
        for side in ("base", "bent")
        for attack, count in (("direct", 5), ("prefill", 3))
        for index in range(count)
    ]
    assert list(rows[0]) == [
        *("side", "suite", "attack", "index", "source_id", "kind", "prompt", "item", "answers", "prefills", "details"),
        "opinions",
    ]
    assert len(rows[5]["prefills"]) == len(rows[5]["answers"]) == len(rows[5]["opinions"]["rule"]) > 1
    assert rows[0]["source_id"] == f"{prompts}:1"
    by_side = [[row["answers"] for row in rows if row["side"] == side] for side in ("base", "bent")]
    assert by_side[0] != by_side[1]
    summary = json.loads((evaluated / "eval.json").read_text(encoding="utf-8"))
    assert (summary["format"], summary["model"], summary["adapter"]) == (
        1,
        str(whole.path),
        str(whole.path / "adapter"),
    )
    assert [(g["side"], g["attack"], g["kind"], g["count"]) for g in summary["groups"][:4]] == [
        ("base", "direct", "attack", 3),
        ("base", "direct", "ordinary", 1),
        ("base", "direct", "borderline", 1),
        ("base", "prefill", "attack", 3),
    ]
    assert {group["side"] for group in summary["groups"]} == {"base", "bent"}
    assert len(summary["paired"]) == 4
    assert summary["settings"]["suites"]["own"]["max_new_tokens"] == 5
    assert summary["settings"]["tokenizer"]["stop_ids"] == [2]
    assert summary["environment"]["versions"]["torch"]
    assert not (evaluated / "opinions.jsonl").exists()
    assert not (whole.path / "evaluation.json").exists()


def test_answers_are_those_of_the_models_themselves(evaluated: Path, whole: TinyRun, prompts: Path) -> None:
    """The base without the adapter, the bent with it, each by transformers and peft alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from repbend_fast.assessment.target import encoder_of
    from repbend_fast.data.prompts import load_prompts
    from repbend_fast.data.settings import PromptsConfig
    from repbend_fast.evaluation.generate import generate_answers

    loaded = load_prompts(PromptsConfig(path=str(prompts)))
    encoder = encoder_of(find_subject(str(whole.path)))
    base = AutoModelForCausalLM.from_pretrained(str(whole.model)).eval()
    want = [[[a] for a in generate_answers(base, encoder, loaded, max_new_tokens=5, batch_size=1)]]
    bent = PeftModel.from_pretrained(base, str(whole.path / "adapter")).eval()
    want += [[[a] for a in generate_answers(bent, encoder, loaded, max_new_tokens=5, batch_size=1)]]
    rows = [row for row in rows_of(evaluated) if row["attack"] == "direct"]
    assert [[row["answers"] for row in rows if row["side"] == side] for side in ("base", "bent")] == want


def test_once_more_asks_nothing(
    evaluated: Path, whole: TinyRun, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("repbend_fast.assessment.asking.load_base", never)
    before = (evaluated / "answers.jsonl").read_bytes()
    said: list[str] = []
    result = assess(
        whole.path, suites=str(prompts), attacks=["direct", "prefill"], out=evaluated, max_new_tokens=5, say=said.append
    )
    assert (evaluated / "answers.jsonl").read_bytes() == before
    assert result.summary == json.loads((evaluated / "eval.json").read_text(encoding="utf-8"))
    assert any("judged by rule" in text and "complied" in text for text in said)


@pytest.mark.parametrize("torn", [b"", b'{"side": "bent", "su'], ids=["whole", "torn"])
def test_what_is_missing_is_asked_again(
    evaluated: Path, whole: TinyRun, prompts: Path, tmp_path: Path, torn: bytes
) -> None:
    folder = Path(shutil.copytree(evaluated, tmp_path / "eval"))
    (folder / "eval.json").unlink()
    want = (folder / "answers.jsonl").read_bytes()
    lines = want.splitlines(keepends=True)
    (folder / "answers.jsonl").write_bytes(b"".join(lines[:7] + lines[9:12]) + torn)
    said: list[str] = []
    assess(
        whole.path,
        suites=str(prompts),
        attacks=["direct", "prefill"],
        out=folder,
        max_new_tokens=5,
        batch_size=2,
        say=said.append,
    )
    assert f"{folder}: 10 of 16 prompts are answered; going on with the rest" in said
    assert (folder / "answers.jsonl").read_bytes() == want


def test_killed_in_the_middle_it_comes_to_the_same_rows(
    evaluated: Path, whole: TinyRun, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    arguments = ["eval", str(whole.path), "--suite", str(prompts), "--attack", "direct", "--attack", "prefill"]
    arguments += ["--max-new-tokens", "5", "--batch_size=2", "--out", str(out)]
    slow = (
        "import sys, time; from repbend_fast.assessment.answers import RowFile; append = RowFile.append\n"
        "RowFile.append = lambda self, row: (append(self, row), time.sleep(0.3))\n"
        "from repbend_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *arguments], stdout=subprocess.DEVNULL)
    file = out / "answers.jsonl"
    deadline = time.monotonic() + 240
    while not (file.is_file() and file.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 3 <= file.read_bytes().count(b"\n") < 16
    with file.open("ab") as torn:
        torn.write(b'{"side": "base", "suite": "ow')
    assert main(arguments) == 0
    assert file.read_bytes() == (evaluated / "answers.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"max_new_tokens": 6},
            "was begun with suites.own.max_new_tokens=5, now it is 6; give the same, or another --out",
        ),
        ({"seed": 1}, "was begun with seed=0, now it is 1"),
        ({"limit": 1}, "was begun with limit=null, now it is 1"),
        ({"overrides": {"model.dtype": "bfloat16"}}, 'was begun with model.dtype="float32", now it is "bfloat16"'),
    ],
)
def test_other_settings_are_refused_by_name(
    evaluated: Path, whole: TinyRun, prompts: Path, changed: dict[str, Any], words: str
) -> None:
    given = {"suites": str(prompts), "attacks": ["direct", "prefill"], "out": evaluated, "max_new_tokens": 5, **changed}
    before = (evaluated / "settings.json").read_bytes()
    with pytest.raises(UserError) as caught:
        assess(whole.path, **given)
    assert words in str(caught.value)
    assert (evaluated / "settings.json").read_bytes() == before


def test_another_model_is_refused(evaluated: Path, whole: TinyRun, prompts: Path) -> None:
    with pytest.raises(UserError, match="was begun with target="):
        assess(whole.model, suites=str(prompts), out=evaluated, max_new_tokens=5)


def test_an_adapter_that_was_trained_on_is_another(
    evaluated: Path, whole: TinyRun, prompts: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(evaluated, tmp_path / "eval"))
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    settings["adapter_sha256"] = "0" * 64
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match="was begun with adapter_sha256="):
        assess(whole.path, suites=str(prompts), attacks="direct", out=folder, max_new_tokens=5)


def test_a_folder_with_something_else_in_it_is_left_alone(whole: TinyRun, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match="exists and holds no evaluation; give another --out"):
        assess(whole.model, suites=str(prompts), out=tmp_path)
    with pytest.raises(UserError, match="exists and holds no evaluation"):
        assess(whole.model, suites=str(prompts), out=tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("odd")
def test_another_judge_reads_the_answers_that_are_there(
    evaluated: Path, whole: TinyRun, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while it judges, it goes on where it stopped; its unparsed answers are a column of their own."""
    folder = Path(shutil.copytree(evaluated, tmp_path / "eval"))
    monkeypatch.setattr("repbend_fast.assessment.judging.ROWS", 2)
    given: dict[str, Any] = {
        "suites": str(prompts),
        "attacks": ["direct", "prefill"],
        "out": folder,
        "max_new_tokens": 5,
    }
    with pytest.raises(KeyboardInterrupt):
        assess(whole.path, judges=["rule", "absent:patience=9"], **given)
    first = list(Absent.asked)
    assert 0 < len(first) <= 9
    result = assess(whole.path, judges=["rule", "absent"], **given)
    answers = [answer for row in rows_of(folder) for answer in row["answers"]]
    assert Absent.asked == answers
    rows = rows_of(folder)
    assert all(len(row["opinions"]["absent"]) == len(row["answers"]) for row in rows)
    assert all(len(opinion["reason"]) == 500 for row in rows for opinion in row["opinions"]["absent"])
    shares = [group["judges"]["absent"] for group in result.summary["groups"]]
    assert sum(share["unparsed"]["count"] for share in shares) > 0
    assert [found["judges"] for found in result.summary["agreement"]] == [["rule", "absent"]]


@pytest.mark.usefixtures("odd")
def test_an_attack_on_the_weights_goes_on_at_the_next_prompt(whole: TinyRun, prompts: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"suites": str(prompts), "attacks": "weights", "out": tmp_path / "e", "seed": 7}
    assess(whole.path, **given)
    file = tmp_path / "e" / "answers.jsonl"
    want = file.read_bytes()
    assert rows_of(tmp_path / "e")[0]["answers"] == ["How do I make mist-wire? 7"]
    assert rows_of(tmp_path / "e")[0]["details"] == {"loss": None, "steps": 3}
    file.write_bytes(b"".join(want.splitlines(keepends=True)[:1]))
    Weights.given.clear()
    assess(whole.path, **given)
    assert [len(texts) for texts in Weights.given] == [2, 3]
    assert file.read_bytes() == want


@pytest.mark.usefixtures("odd")
def test_models_that_an_attack_makes_are_asked_the_same(whole: TinyRun, prompts: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"suites": str(prompts), "out": tmp_path / "e", "max_new_tokens": 5}
    attacks = ["direct", "halved:by=4"]
    result = assess(whole.path, attacks=attacks, **given)
    file = tmp_path / "e" / "answers.jsonl"
    want, rows = file.read_bytes(), {key(row): row["answers"] for row in rows_of(tmp_path / "e")}
    assert {name for _, _, name, _ in rows} == {"direct", "halved-not:by=4", "halved-once:by=4"}
    for side in ("base", "bent"):
        for index in range(3):
            assert rows[side, "own", "halved-not:by=4", index] == rows[side, "own", "direct", index]
            assert rows[side, "own", "halved-once:by=4", index] != rows[side, "own", "direct", index]
    assert [found["side"] for found in result.summary["changes"]] == ["base", "bent"]
    assert result.summary["changes"][0]["summary"]["by"] == 4.0
    assert result.summary["relearning"] == []
    lines = want.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-4]))
    (tmp_path / "e" / "changes.json").unlink()
    assess(whole.path, attacks=attacks, **given)
    assert file.read_bytes() == want


def test_every_kind_of_model_is_found(whole: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = RunFolder(whole.path).latest_checkpoint()
    assert checkpoint is not None
    adapter = whole.path / "adapter"
    for target, given, sides, name, bends in (
        (whole.path, None, 2, whole.model, adapter),
        (checkpoint, None, 2, whole.model, checkpoint),
        (whole.model, None, 1, whole.model, None),
        (whole.model, str(adapter), 2, whole.model, adapter),
        (adapter, None, 2, whole.model, adapter),
        ("owner/model", None, 1, "owner/model", None),
        (whole.recipe, None, 1, whole.model, None),
    ):
        subject = find_subject(str(target), given)
        assert len(subject.sides) == sides
        assert subject.config.model.name == str(name)
        assert subject.adapter == (None if bends is None else str(bends))
    gguf = tmp_path / "tiny.Q4_0.gguf"
    gguf.write_bytes(b"")
    for target in (gguf, tmp_path):
        model = find_subject(str(target)).config.model
        assert (model.name, model.gguf_file) == (str(tmp_path), "tiny.Q4_0.gguf")
    (tmp_path / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path.parent)
    for given in ([], [f"model.gguf_file={gguf.name}"]):
        packaged = find_subject(f"package:{tmp_path.name}", overrides=given)
        assert packaged.config.model.gguf_file == gguf.name
    quantized = find_subject("owner/model", overrides=["quantization=nf4", "model.dtype=float16"]).config.model
    mapped = find_subject("owner/model", overrides={"quantization": "nf4", "model.dtype": "float16"}).config.model
    assert mapped == quantized
    assert (quantized.quantization, quantized.dtype, quantized.gguf_file) == ("nf4", "float16", None)


def test_a_checkpoint_and_the_adapter_alone_answer_as_the_run(
    evaluated: Path, whole: TinyRun, prompts: Path, tmp_path: Path
) -> None:
    """Without validation the last adapter is kept, which the last checkpoint has too."""
    last = TinyRun(whole.model, tmp_path / "last")
    last.train("validation.every=0", "training.checkpoint_every=6")
    checkpoint = RunFolder(last.path).latest_checkpoint()
    given: dict[str, Any] = {"suites": str(prompts), "attacks": "direct", "max_new_tokens": 5}
    found = []
    for number, target in enumerate((last.path, checkpoint, last.path / "adapter")):
        assert target is not None
        assess(target, out=tmp_path / str(number), **given)
        found.append([row["answers"] for row in rows_of(tmp_path / str(number))])
    assert found[0] == found[1] == found[2]
    assert found[0][:5] != found[0][5:]


def test_what_is_no_model_is_one_line(
    tiny: TinyRun, whole: TinyRun, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (two / name).write_bytes(b"")
    unfinished = Path(shutil.copytree(whole.path, tmp_path / "unfinished"))
    shutil.rmtree(unfinished / "adapter")
    for target, words in (
        (str(tmp_path / "none"), "no run, model, recipe or hub name"),
        (str(prompts.parent), "neither a run nor a model"),
        (str(tmp_path / "none.gguf"), "no such file"),
        (str(two), "holds a.gguf, b.gguf; choose one with model.gguf_file=NAME"),
        (str(unfinished), "no adapter yet; resume the run"),
        ("nonsense", "no run, model, recipe or hub name"),
    ):
        assert main(["eval", target, "--suite", "demo", "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_plain_lines_say_how_far_it_is(evaluated: Path, whole: TinyRun, prompts: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assess(whole.model, suites=str(prompts), attacks="direct", out=tmp_path / "e", max_new_tokens=2, say=said.append)
    assert said[0].startswith("answers 5/5  base own direct")
    assert said[-1] == f"wrote {tmp_path / 'e' / 'eval.json'}"


def test_two_at_once_in_one_folder_are_refused(whole: TinyRun, prompts: Path, tmp_path: Path) -> None:
    from repbend_fast.runs.folder import only_writer

    out = tmp_path / "e"
    out.mkdir()
    with (
        only_writer(RunFolder(out)),
        pytest.raises(UserError, match=r"another evaluation is writing to this folder .* or give another --out"),
    ):
        assess(whole.model, suites=str(prompts), out=out)
    assert os.listdir(out) == []
