"""Commands in this process: what they call, print and return. What they call is replaced where it would
load a model.
"""

from __future__ import annotations

import errno
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repbend_fast.cli import main
from repbend_fast.config import Config, load_config, recipe_names, recipe_text, resolved_yaml
from repbend_fast.config.shipped import policy_names
from repbend_fast.errors import UserError

# A hub name is not looked up before training, so these tests need no model.
MODEL = ("model.name=M", "gguf_file=null")

Replace = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Puts a recorder in the place of ``module.function``; it returns ``result`` or raises it."""

    def install(module: str, function: str, result: Any = None) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def record(*args: Any) -> Any:
            calls.append(args)
            if isinstance(result, BaseException):
                raise result
            return result

        stand_in = types.ModuleType(module)
        setattr(stand_in, function, record)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return calls

    return install


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    config = load_config("demo", [*MODEL, "steps=6", f"output.folder={folder}"])
    (folder / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    return folder


def error_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_dry_run_prints_what_load_config_resolves(capsys: pytest.CaptureFixture[str], replace: Replace) -> None:
    calls = replace("repbend_fast.training.trainer", "train")
    assert main(["train", "demo", "--dry-run", "steps=7", "--loss_alpha", "0.25", "--bf16=False"]) == 0
    assert capsys.readouterr().out == resolved_yaml(load_config("demo", ["steps=7", "safe=0.25"]))
    assert calls == []


def test_dry_run_names_missing_files_without_failing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "llama-3-8b-instruct", "--dry-run"]) == 0
    assert (
        capsys.readouterr().err
        == "note: training would stop at data.sources.1.path=wildjailbreak.jsonl: no such file\n"
    )


def test_train_hands_over_the_config_and_returns_the_exit_code(replace: Replace) -> None:
    calls = replace("repbend_fast.training.trainer", "train", types.SimpleNamespace(folder=Path("x"), exit_code=130))
    assert main(["train", "demo", *MODEL, "--max_step", "4", "output.folder=x"]) == 130
    assert calls == [(load_config("demo", [*MODEL, "steps=4", "output.folder=x"]), None)]


def test_train_checks_files_before_the_trainer_is_imported(
    capsys: pytest.CaptureFixture[str], replace: Replace
) -> None:
    calls = replace("repbend_fast.training.trainer", "train")
    assert "data.sources.0.path=none.jsonl: no such file" in error_line(
        capsys, "train", "demo", *MODEL, "data.sources=none.jsonl"
    )
    assert calls == []


@pytest.mark.parametrize("spelled", ["after", "equals", "recipe", "default"])
def test_resume_finds_the_folder_and_its_configuration(spelled: str, run_folder: Path, replace: Replace) -> None:
    calls = replace("repbend_fast.training.trainer", "train", types.SimpleNamespace(folder=run_folder, exit_code=0))
    argv = {
        "after": ["--resume", str(run_folder), "steps=9"],
        "equals": [f"--resume={run_folder}", "steps=9"],
        "recipe": ["demo", *MODEL, "--resume", str(run_folder), "steps=9"],
        "default": ["demo", *MODEL, "--resume", "steps=9", f"output.folder={run_folder}"],
    }[spelled]
    assert main(["train", *argv]) == 0
    [(config, resume)] = calls
    assert isinstance(config, Config)
    assert (config.training.steps, config.output.folder, resume) == (9, str(run_folder), run_folder)


def test_resume_of_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such folder" in error_line(capsys, "train", "demo", "--resume", str(tmp_path / "none"))
    assert "holds no config.yaml" in error_line(capsys, "train", "--resume", str(tmp_path))
    assert "RECIPE is missing" in error_line(capsys, "train")
    assert "RECIPE is missing" in error_line(capsys, "train", "--resume")


def test_eval_takes_a_run_or_a_recipe(run_folder: Path, tmp_path: Path, replace: Replace) -> None:
    calls = replace("repbend_fast.evaluation.sides", "evaluate_target", 0)
    assert main(["eval", str(run_folder), "evaluation.batch_size=2"]) == 0
    assert main(["eval", "demo", *MODEL, "--out", str(tmp_path / "e.json")]) == 0
    (of_run, *places), (of_recipe, *other_places) = calls
    assert (of_run.training.steps, of_run.evaluation.batch_size) == (6, 2)
    assert places == [run_folder, None]
    assert of_recipe == load_config("demo", MODEL)
    assert other_places == [None, tmp_path / "e.json"]


def test_report_prints_the_page(run_folder: Path, capsys: pytest.CaptureFixture[str], replace: Replace) -> None:
    calls = replace("repbend_fast.report", "write_report", run_folder / "report.html")
    assert main(["report", str(run_folder)]) == 0
    assert capsys.readouterr().out == f"{run_folder / 'report.html'}\n"
    assert calls == [(run_folder,)]
    assert "holds no config.yaml" in error_line(capsys, "report", str(run_folder.parent))


def test_report_takes_several_runs_another_place_and_a_folder_of_eval(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated = tmp_path / "evaluated"
    evaluated.mkdir()
    (evaluated / "eval.json").write_text("{}", encoding="utf-8")
    assert main(["report", str(evaluated)]) == 0
    page = tmp_path / "pages" / "both.html"
    assert main(["report", str(run_folder), str(evaluated), "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"{evaluated / 'report.html'}\n{page}\n"
    assert page.read_text(encoding="utf-8").count("<header>") == 2
    assert not (run_folder / "report.html").exists()


def test_export_never_writes_into_a_folder_in_use(
    run_folder: Path, capsys: pytest.CaptureFixture[str], replace: Replace
) -> None:
    calls = replace("repbend_fast.exports.export", "export_run")
    assert main(["export", str(run_folder)]) == 0
    assert [(request.folder, request.out) for (request,) in calls] == [(run_folder, run_folder / "merged")]
    capsys.readouterr()
    assert "is not an empty folder" in error_line(capsys, "export", str(run_folder), "--out", str(run_folder))


def test_verify_passes_objectives_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], replace: Replace) -> None:
    calls = replace("repbend_fast.verify", "run_verify", 1)
    assert main(["verify", str(tmp_path), "--objective", "a", "--objective", "b"]) == 1
    assert main(["verify", str(tmp_path)]) == 1
    assert calls == [(tmp_path, ["a", "b"]), (tmp_path, None)]
    assert "no such folder" in error_line(capsys, "verify", str(tmp_path / "none"))


def test_data_check_of_a_file_counts_characters_unless_a_model_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], replace: Replace
) -> None:
    calls = replace("repbend_fast.runs.check_data", "run_check", 0)
    loaded = replace("repbend_fast.models", "load_tokenizer", "a tokenizer")
    data = tmp_path / "odd, name.jsonl"
    data.write_text("", encoding="utf-8")
    assert main(["data", "check", str(data)]) == 0
    assert "lengths are in characters" in capsys.readouterr().err
    assert main(["data", "check", str(data), "model.name=M", "data.skip_bad_records=true"]) == 0
    (config, tokenizer), (named, named_tokenizer) = calls
    assert [source.path for source in config.data.sources] == [str(data)]
    assert tokenizer is None
    assert (named.model.name, named.data.skip_bad_records, named_tokenizer) == ("M", True, "a tokenizer")
    assert loaded == [(named.model,)]


def test_data_check_of_a_recipe_goes_on_without_its_tokenizer(
    capsys: pytest.CaptureFixture[str], replace: Replace
) -> None:
    calls = replace("repbend_fast.runs.check_data", "run_check", 2)
    replace("repbend_fast.models", "load_tokenizer", UserError("the hub is offline\nsecond line"))
    assert main(["data", "check", "llama-3-8b-instruct", "data.limit=5"]) == 2
    assert (
        capsys.readouterr().err
        == "note: lengths are in characters, the tokenizer is not to be had (the hub is offline second line)\n"
    )
    assert calls == [(load_config("llama-3-8b-instruct", ["data.limit=5"]), None)]
    assert "neither a recipe nor a file" in error_line(capsys, "data", "check", "nothing")


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "ls"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("--with ")]
    policies = [line for line in lines if line.startswith("data make ")]
    assert [line.split()[0] for line in lines if line not in policies] == recipe_names()
    assert [line.split()[2] for line in policies] == policy_names()
    assert main(["recipes", "show", "harbour"]) == 0
    assert "name: harbour" in capsys.readouterr().out
    assert main(["recipes", "show", "demo"]) == 0
    assert capsys.readouterr().out == recipe_text("demo")
    copy = tmp_path / "demo.yaml"
    assert main(["recipes", "cp", "demo", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{copy}\n"
    assert load_config(str(copy)) == load_config("demo")
    assert "exists already" in error_line(capsys, "recipes", "cp", "demo", str(copy))
    assert "no such folder" in error_line(capsys, "recipes", "cp", "demo", str(tmp_path / "none" / "x.yaml"))
    assert "did you mean demo?" in error_line(capsys, "recipes", "show", "demoo")


def test_env_is_json_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["pydantic"][0].isdigit()
    assert found["implementations"]["torch"] == "available"
    assert main(["env"]) == 0
    assert "repbend-fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["trian"], [], ["recipes"], ["report"], ["train", "demo", "extra"], ["report", "--nope", "x"]]
)
def test_a_wrong_command_line_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--help" in error_line(capsys, *argv)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in ("train", "eval", "report", "export", "verify", "data", "recipes", "env"):
        assert f"\n    {command} " in text
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--loss_alpha 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "adapter.safetensors"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "wrapped"],
)
def test_a_full_disk_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str], replace: Replace) -> None:
    replace("repbend_fast.training.trainer", "train", error)
    assert "no space left" in error_line(capsys, "train", "demo", *MODEL)


def test_a_path_that_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str], replace: Replace) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/locked/run")
    replace("repbend_fast.training.trainer", "train", error)
    assert error_line(capsys, "train", "demo", *MODEL) == "error: /locked/run: Permission denied\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "a" * 300 + ".yaml"],
        ["train", f"./{'a' * 300}"],
        ["train", "demo", "gguf_file=null", f"model.name=./{'a' * 300}"],
        ["train", "demo", f"data.sources.0.path={'a/' * 3000}x.jsonl"],
        ["train", "demo", *MODEL, f"output.folder={'a' * 300}"],
        ["eval", "./" + "a" * 300],
        ["report", "a" * 300],
        ["data", "make", f"{'a' * 300}.yaml", "--model", "M", "--out", "o.jsonl"],
    ],
)
def test_what_is_too_long_for_a_path_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "is too long for a path" in error_line(capsys, *argv)


@pytest.mark.parametrize("argv", [["train", "~nobody-here/r.yaml"], ["report", "~nobody-here/run"]])
def test_the_home_of_nobody_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "~nobody-here" in error_line(capsys, *argv)


def test_defects_and_debugging_keep_their_traceback(replace: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    replace("repbend_fast.training.trainer", "train", RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train", "demo", *MODEL])
    monkeypatch.setenv("REPBEND_DEBUG", "1")
    with pytest.raises(UserError):
        main(["train", "demo", "steps=0"])


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str], replace: Replace) -> None:
    replace("repbend_fast.training.trainer", "train", KeyboardInterrupt())
    assert main(["train", "demo", *MODEL]) == 130
    assert capsys.readouterr().err == "interrupted\n"
