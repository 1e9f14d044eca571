"""What README and docs say can be typed, the keys that they name are there, and the README stays short."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

from repbend_fast.cli.api_page import api_page, functions
from repbend_fast.cli.parser import parse
from repbend_fast.config import load_config, recipe_names
from repbend_fast.config.keys import all_keys
from repbend_fast.config.settings_page import settings_page

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")) if path.stem != "log"
}


def commands(page: str) -> list[str]:
    shell = "\n".join(re.findall(r"^```bash\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL))
    return re.findall(r"^(?:\S*/)?repbend-fast ((?:.*\\\n)*.*)$", shell, flags=re.MULTILINE)


COMMANDS = list(dict.fromkeys(command for page in PAGES.values() for command in commands(page)))


def test_the_readme_shows_commands() -> None:
    assert len(commands(README)) >= 6
    assert len(COMMANDS) > 20


def test_the_readme_is_short_and_its_tables_are_narrow() -> None:
    lines = README.splitlines()
    assert len(lines) <= 110
    assert [line for line in lines if line.startswith("|") and len(line) > 100] == []


@pytest.mark.parametrize("name", PAGES)
def test_links_between_pages_lead_somewhere(name: str) -> None:
    here = ROOT if name == "README.md" else ROOT / "docs"
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", PAGES[name]):
        page = here / target if target else here / name
        assert page.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, anchor


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split("\n")[0].strip(" \\"))
def test_commands_of_the_readme_are_understood(command: str) -> None:
    arguments = parse(shlex.split(command.replace("\\\n", " "), comments=True))
    assert callable(arguments.handler)
    if arguments.overrides and not getattr(arguments, "suite", None):  # those are an evaluation's own settings
        target = getattr(arguments, "recipe", None) or "demo"
        load_config(target if target in recipe_names() else "demo", arguments.overrides)


def test_settings_of_the_readme_exist() -> None:
    sections = {key.split(".")[0] for key in all_keys()}
    text = "\n".join(PAGES.values())
    named = {key for key in re.findall(r"`([a-z]+\.[a-z_]+)[`=]", text) if key.split(".")[0] in sections} - {
        "evaluation.json"
    }
    assert len(named) > 20
    of_methods = set(re.findall(r"^- `([a-z_.]+)`", settings_page(), flags=re.MULTILINE))
    assert named <= set(all_keys()) | of_methods


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)) | {"install", "bench", "lint", "clean"}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_page_of_functions_is_up_to_date() -> None:
    """``python -m repbend_fast.cli.api_page > docs/api.md`` writes it."""
    page = api_page()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == page
    assert re.findall(r"^## `(\w+)`$", page, flags=re.MULTILINE)[:-1] == [f.__name__ for f in functions()]
    arguments = {name for function in functions() for name in inspect.signature(function).parameters}
    named = {word for item in re.findall(r"^- `([\w, ]+)`:", page, re.MULTILINE) for word in item.split(", ")}
    assert arguments <= named
