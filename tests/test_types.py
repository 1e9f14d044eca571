"""Types: every function of the package, the ops and the benchmarks has them, and few of them are ``Any``."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = ("repbend_fast", "kernels/repbend_kernels", "benchmarks")
MOST = 100
"""Uses of ``Any`` in all three together. A type that says what is needed stands in its place:
``models.causal.CausalLM``, ``data.tokenizer.Tokenizer``, a ``TypedDict``, ``object`` for a value that is handed on.
"""


def annotations_of(node: ast.AST) -> Iterator[ast.expr | None]:
    """What in ``node`` itself is a type that may be written in quotes."""
    if isinstance(node, ast.arg | ast.AnnAssign):
        yield node.annotation
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.returns
    elif (
        isinstance(node, ast.Call) and node.args and getattr(node.func, "id", getattr(node.func, "attr", "")) == "cast"
    ):
        yield node.args[0]


def uses_of_any(text: str) -> list[int]:
    """The line of each use of ``Any``, under whatever name it was imported and in quoted types too."""
    tree = ast.parse(text)
    names = {"Any"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("typing", "typing_extensions"):
            names |= {alias.asname for alias in node.names if alias.name == "Any" and alias.asname}
    lines = []
    for node in ast.walk(tree):
        if (isinstance(node, ast.Name) and node.id in names) or getattr(node, "attr", "") == "Any":
            lines.append(node.lineno)
        for annotation in annotations_of(node):
            for part in ast.walk(annotation) if annotation is not None else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    lines += [part.lineno] * sum(word in names for word in re.findall(r"\w+", part.value))
    return lines


@pytest.mark.parametrize(
    ("text", "uses"),
    [
        ("from typing import Any\nx: dict[str, Any] = {}\ndef f(a: Any, *b: Any) -> Any: ...", 4),
        ("from typing import Any as A\nimport typing as t\nx: A\ny: t.Any = cast(A, 1)", 3),
        ("x: 'Any'\ndef f(a: list['Any']) -> 'dict[str, Any]': return cast('Any', a)", 4),
        ("from typing import Any\n# Any\ndef any_of(x: object) -> str:\n    '''Any of them.'''\n    return 'Any'", 0),
    ],
    ids=["plain", "renamed", "quoted", "no type"],
)
def test_uses_of_any_are_found(text: str, uses: int) -> None:
    assert len(uses_of_any(text)) == uses


def test_any_is_rare() -> None:
    files = [path for tree in TREES for path in sorted((ROOT / tree).rglob("*.py"))]
    assert len(files) > 150
    found = {path.relative_to(ROOT).as_posix(): len(uses_of_any(path.read_text(encoding="utf-8"))) for path in files}
    most = sorted(((count, path) for path, count in found.items() if count), reverse=True)
    assert sum(found.values()) <= MOST, "\n".join(f"{count:4} {path}" for count, path in most)


def test_untyped_functions_are_refused_everywhere() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert settings["disallow_untyped_defs"] is True
    assert set(TREES) <= set(settings["files"])
    assert not {"packages", "modules", "exclude", "ignore_errors"} & settings.keys()
    for override in settings.get("overrides", []):
        assert override.get("disallow_untyped_defs", True), override["module"]
        assert not override.get("ignore_errors", False), override["module"]
