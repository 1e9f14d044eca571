"""Handlers of the commands. Each imports what it needs when it runs."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repbend_fast import api
from repbend_fast.cli.output import listener, print_json
from repbend_fast.console import note, saying, terminal
from repbend_fast.errors import UserError, one_line
from repbend_fast.nearby import own_path

if TYPE_CHECKING:
    from repbend_fast.config import Config
    from repbend_fast.data.tokenizer import Tokenizer
    from repbend_fast.evaluation.rates import Side

EXIT_INTERRUPTED = 130


def train(arguments: Namespace) -> int:
    """``train``: a dry run prints the configuration, a full one what is shown for the model, anything else trains."""
    if arguments.recipe is None and not arguments.resume:
        raise UserError("RECIPE is missing; `repbend-fast recipes ls` lists the shipped ones")
    resume = False if arguments.resume is None else arguments.resume or True
    if arguments.dry_run is not None:
        return _dry_run(arguments, resume)
    say = listener(arguments)
    run = api.train(arguments.recipe, arguments.overrides, overlays=arguments.overlays, resume=resume, say=say)
    if arguments.json:
        measured = run.evaluation
        sides = {"before": measured and _rates(measured.before), "after": measured and _rates(measured.after)}
        print_json({"folder": run.folder, "adapter": run.adapter, "interrupted": run.interrupted, **sides})
    return EXIT_INTERRUPTED if run.interrupted else 0


def _rates(side: Side | None) -> dict[str, object] | None:
    """One side of an evaluation without its answers."""
    return None if side is None else {key: value for key, value in side.items() if key != "samples"}


def _dry_run(arguments: Namespace, resume: bool | str) -> int:
    from repbend_fast.config import check_files, missing_files, resolved_yaml

    config, folder = api.training_config(arguments.recipe, arguments.overrides, arguments.overlays, resume)
    if arguments.dry_run == "plain":
        print(resolved_yaml(config), end="")
        for problem in missing_files(config):
            note(f"training would stop at {problem}")
        return 0
    check_files(config)
    from repbend_fast.training.dry_run import dry_run

    return dry_run(config, folder)


def evaluate(arguments: Namespace) -> int:
    """``eval``: a run's folder or a recipe as it says itself, or any model with suites, attacks and judges."""
    from repbend_fast.cli.evaluating import assess, is_assessment

    if is_assessment(arguments):
        return assess(arguments)
    say = listener(arguments)
    found = api.evaluate(arguments.target, arguments.overrides, overlays=arguments.overlays, out=arguments.out, say=say)
    if arguments.json:
        print_json({"before": _rates(found.before), "after": _rates(found.after), "file": found.file})
    return 0


def compare(arguments: Namespace) -> int:
    """``compare``: the same command typed again goes on where it stopped."""
    from repbend_fast.compare import DEFAULT_RECIPES, load_comparison, run_compare

    options: dict[str, Any] = {
        name: value for name in ("seeds", "rates", "jobs") if (value := getattr(arguments, name)) is not None
    }
    words = [
        *arguments.recipes,
        *(f"--with={overlay}" for overlay in arguments.overlays),
        *([] if arguments.out is None else ["--out", arguments.out]),
    ]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if arguments.recipe_rates:
        words.append("--recipe-rates")
    if arguments.out is not None:
        options["folder"] = own_path(arguments.out)
    comparison = load_comparison(
        arguments.recipes or DEFAULT_RECIPES,
        arguments.overrides,
        overlays=arguments.overlays,
        recipe_rates=arguments.recipe_rates,
        **options,
    )
    with saying(listener(arguments)):
        return run_compare(comparison, shlex.join(["repbend-fast", "compare", *words, *arguments.overrides]))


def report(arguments: Namespace) -> int:
    """``report``: writes a page and prints its path. What ``eval`` leaves of a model that was not trained here holds no
    configuration.
    """
    places = [own_path(run) for run in arguments.runs]
    folders = [place if (place / "eval.json").is_file() else api.run_config(place).parent for place in places]
    options = {} if arguments.out is None else {"out": own_path(arguments.out)}
    from repbend_fast.report import write_report

    print(write_report(*folders, **options))
    return 0


def export(arguments: Namespace) -> int:
    """``export``: writes what was asked for and prints its folder."""
    print(
        api.export(
            arguments.run,
            arguments.out,
            format=arguments.format,
            gguf_type=arguments.type,
            check=arguments.check,
            bound=arguments.bound,
            say=terminal,
        )
    )
    return 0


def verify(arguments: Namespace) -> int:
    """``verify``: 0 if every value is within tolerance."""
    folder = own_path(arguments.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    from repbend_fast.verify import run_verify

    return int(run_verify(folder, arguments.objective))


def env(arguments: Namespace) -> int:
    """``env``: what a bug report needs, as a table or as JSON."""
    from repbend_fast.environment import environment

    found = environment()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for section, values in found.items():
        if not isinstance(values, dict):
            print(f"{section}  {values}")
            continue
        print(section)
        width = max(map(len, values))
        for key, value in values.items():
            print(f"  {key:<{width}}  {value}")
    return 0


def check_data(arguments: Namespace) -> int:
    """``data check``: a recipe's sources with its tokenizer, or one file."""
    config, tokenizer = _data_to_check(arguments.target, arguments.overrides, arguments.overlays)
    if not arguments.json:
        from repbend_fast.runs.check_data import run_check

        return int(run_check(config, tokenizer))
    from repbend_fast.runs.check_data import check_as_json

    code, found = check_as_json(config, tokenizer)
    print_json(found)
    return code


def _data_to_check(target: str, overrides: list[str], overlays: list[str]) -> tuple[Config, Tokenizer | None]:
    from repbend_fast.config import load_config
    from repbend_fast.config.shipped import SUFFIXES, overlay_meant, recipe_names
    from repbend_fast.nearby import nearest

    path = own_path(target)
    if target in recipe_names() or target.endswith(SUFFIXES):
        config = load_config(target, overrides, overlays=overlays)
        return config, _tokenizer(config)
    if not path.is_file():
        remedy = overlay_meant(target) or f"`repbend-fast recipes ls` lists the recipes{nearest(target)}"
        raise UserError(f"{target}: neither a recipe nor a file; {remedy}")
    # Any valid recipe can carry the file; its model counts only if the user names one.
    bare = load_config("demo")
    config = load_config("demo", ["model.gguf_file=null", *_quoted_source(path), *overrides], overlays=overlays)
    if config.model.name == bare.model.name:
        note("lengths are in characters; model.name=… adds token counts")
        return config, None
    return config, _tokenizer(config)


def _quoted_source(path: Path) -> list[str]:
    return [f"data.sources=[{{path: {json.dumps(str(path))}}}]", "validation.sources=[]"]


def _tokenizer(config: Config) -> Tokenizer | None:
    """The model's tokenizer, or None with a note: the records can be checked without it."""
    from repbend_fast.models import load_tokenizer

    try:
        return load_tokenizer(config.model)
    except (UserError, OSError, ValueError) as error:
        note(f"lengths are in characters, the tokenizer is not to be had ({one_line(error)})")
        return None
