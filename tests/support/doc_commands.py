"""Command lines in the fenced blocks of README and docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem != "log"))
SHELL = ("bash", "sh", "console", "shell")
PROGRAMS = tuple("repbend-fast make pip python python3 pytest torchrun curl echo git cd".split())


class Line(NamedTuple):
    """A command as a reader would type it, without comments."""

    page: str
    command: str


def shell_lines(page: Path) -> list[str]:
    """Of blocks that are marked as shell every line; of unmarked ones those that begin with a known program."""
    found = []
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        if language and language not in SHELL:
            continue
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            command = re.sub(r"(^|\s+)#.*$", "", line).strip().removeprefix("$ ")
            program = command.split(" ")[0].rsplit("/", 1)[-1]
            if command and (language or program in PROGRAMS):
                found.append(command)
    return found


def lines() -> list[Line]:
    """Every command once, with the first page that shows it."""
    found: dict[str, str] = {}
    for page in PAGES:
        for command in shell_lines(page):
            found.setdefault(command, page.name)
    return [Line(page, command) for command, page in found.items()]
