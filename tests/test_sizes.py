"""No function of more than 60 lines, no file of more than 500, no line of more than 120 characters, tests included."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUNCTION_LINES, FILE_LINES, LINE_CHARACTERS = 60, 500, 120
METHOD_LINES = 120
# A comment for a checker stands on the line that it is about, so it counts for nothing, as in the linter.
FOR_CHECKERS = re.compile(r"\s*# (?:type: ignore|noqa)\b.*$")


def tracked() -> list[Path]:
    """Every Python file that git knows or would add; without a repository, those that lie in the project's folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.py"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode == 0:
        return sorted(path for name in found.stdout.split("\0") if name and (path := ROOT / name).exists())
    folders = ("repbend_fast", "kernels", "benchmarks", "examples", "tests")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def too_large(text: str) -> Iterator[str]:
    """``line: what`` for each thing above its limit; a function counts from its ``def`` to its last line."""
    lines = text.splitlines()
    if len(lines) > FILE_LINES:
        yield f"1: file of {len(lines)} lines"
    for number, line in enumerate(lines, 1):
        if len(FOR_CHECKERS.sub("", line)) > LINE_CHARACTERS:
            yield f"{number}: line of {len(line)} characters"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > FUNCTION_LINES:
                yield f"{node.lineno}: function {node.name} of {count} lines"


def test_no_file_holds_anything_too_large() -> None:
    files = tracked()
    assert len(files) > 200
    found = [f"{path.relative_to(ROOT)}:{what}" for path in files for what in too_large(path.read_text("utf-8"))]
    assert not found, "\n".join(found)


def test_a_method_reads_on_a_page_and_a_half() -> None:
    """Settings and streams of one method, in one file of less than 120 lines."""
    texts = {p.name: p.read_text("utf-8") for p in (ROOT / "repbend_fast" / "objectives").glob("*.py")}
    methods = {name: text.count("\n") for name, text in texts.items() if "\n@method(" in text}
    assert len(methods) > 10
    assert {name: lines for name, lines in methods.items() if lines >= METHOD_LINES} == {}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("def long():\n" + "    pass\n" * 60, "1: function long of 61 lines"),
        ("class A:\n    async def long(\n        self,\n    ):\n" + "        pass\n" * 58, "function long of 61 lines"),
        ("pass\n" * 501, "1: file of 501 lines"),
        (f"a = 1\nb = {'1' * 117}\n", "2: line of 121 characters"),
    ],
)
def test_what_is_one_above_its_limit_is_found(text: str, what: str) -> None:
    [found] = too_large(text)
    assert what in found


def test_what_is_at_its_limit_is_not() -> None:
    long = "@cache\ndef long():\n" + "    pass\n" * 59
    assert not list(too_large(long + "pass\n" * 438 + f"b = {'1' * 116}  # type: ignore[assignment]\n"))
