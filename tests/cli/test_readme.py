"""What the README says can be typed, and the keys that it names are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from repbend_fast.cli.parser import parse
from repbend_fast.config import load_config, recipe_names
from repbend_fast.config.keys import all_keys

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"^```bash\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^repbend-fast ((?:.*\\\n)*.*)$", SHELL, flags=re.MULTILINE)


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split("\n")[0].strip(" \\"))
def test_commands_of_the_readme_are_understood(command: str) -> None:
    arguments = parse(shlex.split(command.replace("\\\n", " "), comments=True))
    assert callable(arguments.handler)
    if arguments.overrides:
        target = getattr(arguments, "recipe", None) or "demo"
        load_config(target if target in recipe_names() else "demo", arguments.overrides)


def test_settings_of_the_readme_exist() -> None:
    sections = {key.split(".")[0] for key in all_keys()}
    named = {key for key in re.findall(r"`([a-z]+\.[a-z_]+)[`=]", README) if key.split(".")[0] in sections} - {
        "evaluation.json"
    }
    assert len(named) > 20
    assert named <= set(all_keys())


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)) | {"install", "bench", "lint", "clean"}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
