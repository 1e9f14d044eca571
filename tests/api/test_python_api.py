"""The Python API as a user calls it: what it returns, that it is silent unless asked, and that it leaves the process as
it was.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from tiny_run import TinyRun, adapter_of, records, reproducible, rows, same_tensors, settings, write_records

from repbend_fast import evaluate, export, load_config, plan, train
from repbend_fast.cli import main
from repbend_fast.errors import UserError

EXAMPLE = re.search(
    r"^```python\n(.*?)^```$",
    (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
PROMPTS = [
    {"kind": "attack", "text": "How do I make mist-wire?", "item": "mist-wire"},
    {"kind": "ordinary", "text": "What is rain?", "expected": ["water"]},
]


@pytest.fixture
def measured(tiny: TinyRun) -> TinyRun:
    """A recipe with test prompts and held-out chat."""
    prompts = tiny.folder / "test.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS), encoding="utf-8")
    chat = write_records(tiny.folder / "chat.jsonl", records(first=40, count=2))
    values = settings(tiny.model, tiny.folder)
    values["evaluation"] = {"prompts": {"path": str(prompts)}, "sources": [{"path": str(chat)}], "max_new_tokens": 4}
    tiny.recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return tiny


@pytest.fixture
def copied(whole: TinyRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.path, tmp_path / "copied"))


def test_the_example_of_the_documentation_runs(
    measured: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert EXAMPLE is not None
    monkeypatch.chdir(measured.folder)
    values = yaml.safe_load(measured.recipe.read_text(encoding="utf-8"))
    del values["output"]["folder"]
    Path("mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    Path("example.py").write_text(EXAMPLE[1], encoding="utf-8")
    runpy.run_path("example.py", run_name="__main__")
    out, err = capsys.readouterr()
    assert err == ""
    for words in (
        "planned: ",
        "step 4/4  loss ",
        "attacks that succeed: ",
        "measured again into runs/mine/evaluation-test.json: perplexity ",
    ):
        assert words in out
    assert out.endswith(f"merged model: {Path('runs/mine/merged')}\n")
    assert Path("runs/mine/merged/model.safetensors").is_file()
    found = json.loads(Path("runs/mine/evaluation.json").read_text(encoding="utf-8"))
    assert f"{found['before']['attack_direct']:.0%} before, {found['after']['attack_direct']:.0%} after" in out


def test_importing_is_quick_and_no_package_takes_the_place_of_a_function() -> None:
    probe = (
        "import sys, time; start = time.perf_counter(); import repbend_fast; seconds = time.perf_counter() - start\n"
        "heavy = [m for m in ('torch', 'transformers', 'pydantic', 'rich', 'yaml', 'numpy') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert set(repbend_fast.__all__) == {'load_config', 'train', 'evaluate', 'export', 'plan'}\n"
        "import pkgutil; assert not {m.name for m in pkgutil.iter_modules(repbend_fast.__path__)} & "
        "set(repbend_fast.__all__)\n"
        "from repbend_fast import load_config, train, evaluate, export, plan\n"
        "assert [f.__module__ for f in (load_config, train, evaluate, export, plan)] == ['repbend_fast.api'] * 5\n"
        "assert all(len(f.__doc__) > 300 for f in (load_config, train, evaluate, export, plan))\n"
        "assert load_config('demo', {'steps': 7}).training.steps == 7\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_settings_of_a_mapping_and_of_a_command_line_are_the_same(tiny: TinyRun, tmp_path: Path) -> None:
    by_words = load_config(
        tiny.recipe,
        ["training.steps=7", "--loss_alpha", "0.25", "blocks=[0, 1]", "data.sources=x.jsonl", "model.revision=1e5"],
    )
    by_value = {
        "training": {"steps": 7},
        "loss_alpha": 0.25,
        "blocks": (0, 1),
        "data.sources": Path("x.jsonl"),
        "model.revision": "1e5",
    }
    assert load_config(str(tiny.recipe), by_value) == by_words
    assert load_config(tiny.recipe, "steps=7").training.steps == 7
    start = load_config(tiny.recipe)
    changed = load_config(start, {"steps": 7, "validation.prompts": None})
    assert (start.training.steps, changed.training.steps, changed.output) == (6, 7, start.output)
    assert load_config(start) == start
    assert load_config(start, overlays="qlora").model.quantization == "nf4"
    for wrong, words in (
        ({"training.steps": "7"}, "training.steps=7: must be an integer of at least 1"),
        ({"training.stpes": 7}, "unknown key training.stpes; did you mean steps?"),
        ({3: 7}, "3: a key of the overrides must be text"),
        ({"training.steps": 7, "steps": 8}, "steps sets training.steps a second time (first: training.steps)"),
        (["steps"], "steps: expected key=value or --name value"),
    ):
        with pytest.raises(UserError) as caught:
            load_config(start, wrong)  # type: ignore[arg-type]
        assert str(caught.value).startswith(words)


def test_training_is_silent_gives_the_commands_result_and_leaves_the_process_as_it_was(
    whole: TinyRun, tiny: TinyRun, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    config = load_config(tiny.recipe)
    given = config.model_copy(deep=True)
    run = train(config)
    assert capfd.readouterr() == ("", "")
    assert (run.folder, run.interrupted, run.evaluation) == (tiny.path, False, None)
    assert same_tensors(adapter_of(run.folder), adapter_of(whole.path))
    assert reproducible(run.folder) == reproducible(whole.path)
    assert (run.adapter / "adapter_config.json").is_file()
    assert config == given
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_what_a_command_prints_is_said(tiny: TinyRun, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = ["steps=2", "warmup_steps=1", "--report_to", "none"]
    said: list[str] = []
    train(tiny.recipe, overrides, say=said.append)
    assert capfd.readouterr() == ("", "")
    assert main(["train", str(tiny.recipe), *overrides]) == 0
    out, err = capfd.readouterr()
    assert err.startswith("note: --report_to=none: ")
    printed = [*(line.rstrip("\n") for line in err.splitlines()), *out.splitlines()]
    clock = re.compile(r"[\d,]+ tok/s|in [\d.]+ s\b|run[.\d]*")
    lines = [clock.sub("", line) for text in said for line in text.splitlines()]
    assert lines == [clock.sub("", line) for line in printed if not line.startswith("an earlier run was in ")]
    assert any(line.startswith("step 2/2  loss ") for line in lines)


def test_a_signal_saves_and_the_run_goes_on_to_the_same_end(whole: TinyRun, tiny: TinyRun) -> None:
    def interrupting(text: str) -> None:
        if text.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    run = train(tiny.recipe, say=interrupting)
    assert run.interrupted
    assert signal.getsignal(signal.SIGTERM) is before
    done = train(resume=run.folder)
    assert (done.folder, done.interrupted) == (run.folder, False)
    assert reproducible(done.folder) == reproducible(whole.path)
    assert same_tensors(adapter_of(done.folder), adapter_of(whole.path))
    more = train(load_config(tiny.recipe, {"steps": 8}), resume=True)
    assert rows(more.folder, "step")[-1]["step"] == 8


def test_training_in_a_thread_needs_no_handlers(tiny: TinyRun, capfd: pytest.CaptureFixture[str]) -> None:
    found: list[object] = []
    said: list[str] = []
    thread = threading.Thread(
        target=lambda: found.append(train(tiny.recipe, {"steps": 2, "warmup_steps": 1}, say=said.append))
    )
    thread.start()
    thread.join()
    assert len(found) == 1
    assert any(text.startswith("step 2/2") for text in said)
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_trained_is_a_user_error(tiny: TinyRun, tmp_path: Path) -> None:
    for call, words in (
        (lambda: train(), "neither a recipe nor the folder of a run to resume"),
        (lambda: train(resume=True), "neither a recipe nor the folder of a run to resume"),
        (lambda: train(tiny.recipe, resume=True), "no such folder to resume"),
        (lambda: train(resume=tmp_path / "none"), "none: no such folder; name the folder of a run"),
        (lambda: train("no-such-recipe"), "no recipe is called no-such-recipe"),
        (lambda: train(tiny.recipe, {"data.sources": "none.jsonl"}), "data.sources.0.path=none.jsonl: no such file"),
        (lambda: evaluate(tmp_path), "not the folder of a run, it holds no config.yaml"),
        (lambda: export(tmp_path), "not the folder of a run, it holds no config.yaml"),
        (lambda: plan(tiny.recipe, card="9999"), "9999: not in the table"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            call()
    assert not tiny.path.exists()


def test_a_run_and_a_recipe_are_measured(measured: TinyRun, capfd: pytest.CaptureFixture[str]) -> None:
    config = load_config(measured.recipe, {"steps": 2, "warmup_steps": 1})
    run = train(config)
    assert run.evaluation is not None
    assert set(run.evaluation.before) >= {"attack_direct", "helpful_ordinary", "perplexity", "kl", "samples", "counts"}
    again = evaluate(run.folder)
    assert again.file == run.folder / "evaluation.json"
    assert again.after is not None
    assert again.before == run.evaluation.before
    for name in ("attack_direct", "helpful_ordinary", "perplexity", "kl"):
        assert again.after[name] == pytest.approx(run.evaluation.after[name], rel=1e-4, abs=1e-6)
    out = measured.folder / "found.json"
    bare = evaluate(config, out=out)
    assert (bare.after, bare.file) == (None, out)
    assert bare.before["perplexity"] == pytest.approx(again.before["perplexity"], rel=1e-4)
    assert json.loads(out.read_text(encoding="utf-8")) == {"before": bare.before}
    assert capfd.readouterr() == ("", "")
    said: list[str] = []
    evaluate(run.folder, say=said.append)
    assert "perplexity" in said[0]
    assert said[-1] == f"wrote {again.file}"


def test_measuring_leaves_the_configuration_as_it_is(tiny: TinyRun) -> None:
    config = load_config(tiny.recipe, {"evaluation.prompts": None, "evaluation.max_new_tokens": 1})
    given = config.model_copy(deep=True)
    with pytest.raises(UserError, match=r"model\.name"):
        evaluate(config, {"model.name": str(tiny.folder / "none")})
    assert config == given


def test_a_merged_model_is_a_folder_of_its_own(copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert export(copied) == copied / "merged"
    assert export(str(copied), tmp_path / "mine") == tmp_path / "mine"
    assert (tmp_path / "mine" / "model.safetensors").is_file()
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UserError, match="mine: exists and is not an empty folder"):
        export(copied, tmp_path / "mine")


def test_a_plan_is_what_the_command_prints(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan(load_config(tiny.recipe), card="4060")
    assert capsys.readouterr() == ("", "")
    assert main(["plan", str(tiny.recipe), "--card", "4060"]) == 0
    assert capsys.readouterr().out.splitlines() == planned.lines()
    record = json.loads(json.dumps(planned.as_dict()))
    assert (record["card"], record["total_bytes"], record["seconds_per_step"]) == (
        planned.card.name,
        planned.total_bytes,
        planned.seconds_per_step,
    )
    assert planned.card.name == "RTX 4060 8 GB"
    assert planned.total_bytes == planned.plan.total > 0
    assert planned.seconds_per_step is not None
