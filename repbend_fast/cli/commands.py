"""Handlers of the commands. Each imports what it needs when it runs."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repbend_fast.errors import UserError

if TYPE_CHECKING:
    from repbend_fast.config import Config

RUN_CONFIG = "config.yaml"


def train(arguments: Namespace) -> int:
    """``train``: a dry run prints the configuration, a full one what is shown for the model, anything else trains."""
    from repbend_fast.config import check_files, load_config, missing_files, resolved_yaml

    resume = None if arguments.resume is None else Path(arguments.resume).expanduser()
    named = bool(arguments.resume)
    if arguments.recipe is None and not named:
        raise UserError("RECIPE is missing; `repbend-fast recipes ls` lists the shipped ones")
    recipe = arguments.recipe if arguments.recipe is not None else str(_run_config(str(resume)))
    config = load_config(recipe, arguments.overrides)
    if resume is not None:
        resume = resume if named else Path(config.output.folder)
        if not resume.is_dir():
            raise UserError(f"--resume {resume}: no such folder; train without --resume to start it")
        config.output.folder = str(resume)
    if arguments.dry_run == "plain":
        print(resolved_yaml(config), end="")
        for problem in missing_files(config):
            print(f"note: training would stop at {problem}", file=sys.stderr)
        return 0
    check_files(config)
    if arguments.dry_run == "full":
        from repbend_fast.training.dry_run import dry_run

        return dry_run(config, resume)
    from repbend_fast.training.trainer import train as run_training

    return int(run_training(config, resume).exit_code)


def evaluate(arguments: Namespace) -> int:
    """``eval``: a run's folder, or a recipe."""
    from repbend_fast.config import check_files, load_config

    folder = Path(arguments.target).expanduser()
    is_run = folder.is_dir()
    config = load_config(str(_run_config(arguments.target)) if is_run else arguments.target, arguments.overrides)
    check_files(config)
    from repbend_fast.evaluation.sides import evaluate_target

    out = None if arguments.out is None else Path(arguments.out).expanduser()
    return evaluate_target(config, folder if is_run else None, out)


def compare(arguments: Namespace) -> int:
    """``compare``: the same command typed again goes on where it stopped."""
    from repbend_fast.compare import DEFAULT_RECIPES, load_comparison, run_compare

    options: dict[str, Any] = {name: value for name in ("seeds", "rates", "jobs") if (value := getattr(arguments, name)) is not None}
    words = [*arguments.recipes, *([] if arguments.out is None else ["--out", arguments.out])]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if arguments.out is not None:
        options["folder"] = Path(arguments.out).expanduser()
    comparison = load_comparison(arguments.recipes or DEFAULT_RECIPES, arguments.overrides, **options)
    return run_compare(comparison, shlex.join(["repbend-fast", "compare", *words, *arguments.overrides]))


def report(arguments: Namespace) -> int:
    """``report``: writes ``report.html`` and prints its path."""
    folder = _run_config(arguments.run).parent
    from repbend_fast.report import write_report

    print(write_report(folder))
    return 0


def export(arguments: Namespace) -> int:
    """``export``: writes the merged model and prints its folder."""
    folder = _run_config(arguments.run).parent
    out = folder / "merged" if arguments.out is None else Path(arguments.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder; choose another")
    from repbend_fast.runs.export import export_merged

    export_merged(folder, out)
    print(out)
    return 0


def verify(arguments: Namespace) -> int:
    """``verify``: 0 if every value is within tolerance."""
    folder = Path(arguments.folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    from repbend_fast.verify import run_verify

    return int(run_verify(folder, arguments.objective))


def check_data(arguments: Namespace) -> int:
    """``data check``: a recipe's sources with its tokenizer, or one file."""
    config, tokenizer = _data_to_check(arguments.target, arguments.overrides)
    from repbend_fast.runs.check_data import run_check

    return int(run_check(config, tokenizer))


def _data_to_check(target: str, overrides: list[str]) -> tuple[Config, Any]:
    from repbend_fast.config import load_config
    from repbend_fast.config.shipped import SUFFIXES, recipe_names
    from repbend_fast.nearby import nearest

    path = Path(target).expanduser()
    if target in recipe_names() or target.endswith(SUFFIXES):
        config = load_config(target, overrides)
        return config, _tokenizer(config)
    if not path.is_file():
        raise UserError(f"{target}: neither a recipe nor a file; `repbend-fast recipes ls` lists the recipes{nearest(target)}")
    # Any valid recipe can carry the file; its model counts only if the user names one.
    bare = load_config("demo")
    config = load_config("demo", ["model.gguf_file=null", *_quoted_source(path), *overrides])
    if config.model.name == bare.model.name:
        print("note: lengths are in characters; model.name=… adds token counts", file=sys.stderr)
        return config, None
    return config, _tokenizer(config)


def _quoted_source(path: Path) -> list[str]:
    import json

    return [f"data.sources=[{{path: {json.dumps(str(path))}}}]", "validation.sources=[]"]


def _tokenizer(config: Config) -> Any:
    """The model's tokenizer, or None with a note: the records can be checked without it."""
    from repbend_fast.models import load_tokenizer

    try:
        return load_tokenizer(config.model)
    except (UserError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        print(f"note: lengths are in characters, the tokenizer is not to be had ({reason[:200]})", file=sys.stderr)
        return None


def _run_config(run: str) -> Path:
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise UserError(f"{run}: no such folder; name the folder of a run")
    if not (folder / RUN_CONFIG).is_file():
        raise UserError(f"{run}: not the folder of a run, it holds no {RUN_CONFIG}")
    return folder / RUN_CONFIG
