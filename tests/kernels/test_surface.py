"""What is used of ``repbend_kernels`` from outside is declared: names in the ``__all__`` of a module that has one."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "repbend_kernels"
PACKAGE = ROOT / "kernels" / NAME
USERS = ("repbend_fast", "benchmarks", "examples")
DECLARED = {
    NAME,
    *(f"{NAME}.{module}" for module in ("blocks", "low_rank_sizes", "oracles", "scratch", "triton")),
    *(
        f"{NAME}.triton.{op}"
        for op in (
            "dequantize_nf4",
            "keyed_dropout",
            "linear_kl_div",
            "linear_log_prob",
            "low_rank",
            "low_rank_down",
            "pairwise_cosine",
            "row_distance",
            "tap_rows",
        )
    ),
}


def file_of(module: str) -> Path | None:
    """Where a module's code lies; None for what is no module."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


@cache
def declared(module: str) -> frozenset[str] | None:
    """The names in a module's ``__all__``; None where it declares none."""
    file = file_of(module)
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file else []:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return frozenset(ast.literal_eval(node.value))
    return None


@cache
def is_module(package: str, name: str) -> bool:
    """Whether ``from package import name`` gives a module: there is one, and the package binds nothing else to its
    name.
    """
    file = file_of(package)
    if file is None or file.name != "__init__.py" or file_of(f"{package}.{name}") is None:
        return False
    imports = [
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    return not any((alias.asname or alias.name) == name for node in imports for alias in node.names)


def inside(name: str | None) -> bool:
    return name is not None and (name == NAME or name.startswith(f"{NAME}."))


def dotted(node: ast.expr) -> str | None:
    """``a.b.c`` as text."""
    if isinstance(node, ast.Name):
        return node.id
    owner = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return f"{owner}.{node.attr}" if isinstance(node, ast.Attribute) and owner else None


def bound_modules(tree: ast.AST) -> dict[str, str]:
    """The names under which a file, its functions included, holds modules of the package, and which."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {
                alias.asname or NAME: alias.name if alias.asname else NAME for alias in node.names if inside(alias.name)
            }
        elif isinstance(node, ast.ImportFrom) and node.module and inside(node.module):
            found = {
                alias.asname or alias.name: f"{node.module}.{alias.name}"
                for alias in node.names
                if is_module(node.module, alias.name)
            }
            bound |= found
    return bound


def imported_by_name(node: ast.AST) -> str | None:
    """The module that ``import_module("…")`` or ``__import__("…")`` asks for."""
    if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
        return None
    called, asked = dotted(node.func) or "", node.args[0].value
    return asked if called.rpartition(".")[2] in ("import_module", "__import__") and isinstance(asked, str) else None


def undeclared(code: str) -> Iterator[str]:
    """What ``code`` uses of the package without a declaration."""
    tree = ast.parse(code)
    bound = bound_modules(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and inside(node.module):
            names = declared(node.module)
            yield from (
                f"{node.module}.{alias.name}"
                for alias in node.names
                if names is None or alias.name not in {*names, "*"}
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if inside(alias.name) and declared(alias.name) is None)
        elif inside(imported_by_name(node)) and declared(str(imported_by_name(node))) is None:
            yield str(imported_by_name(node))
        elif isinstance(node, ast.Attribute):
            first, _, rest = (dotted(node) or "").partition(".")
            module = bound.get(first)
            *owners, name = rest.split(".")
            for owner in owners if module else ():
                module = f"{module}.{owner}"
            if module and file_of(module) and not name.startswith("__") and name not in (declared(module) or ()):
                yield f"{module}.{name}"


def test_the_trainer_and_the_benchmarks_use_what_is_declared() -> None:
    files = [file for folder in USERS for file in sorted((ROOT / folder).rglob("*.py"))]
    used = {file: file.read_text(encoding="utf-8") for file in files}
    assert sum(NAME in code for code in used.values()) > 12
    assert [f"{file.relative_to(ROOT)}: {name}" for file, code in used.items() for name in undeclared(code)] == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from repbend_kernels.checks import accumulate_dtype", "checks.accumulate_dtype"),
        ("from repbend_kernels.blocks import RowReader", "blocks.RowReader"),
        ("from repbend_kernels import selection", "selection"),
        ("from repbend_kernels import checks as c", "checks"),
        ("def f():\n    from repbend_kernels.rows import blocks", "rows.blocks"),
        ("import repbend_kernels.launch", "launch"),
        ("import repbend_kernels as k\nk.head.default_chunk_rows(1)", "head.default_chunk_rows"),
        ("import repbend_kernels\nrepbend_kernels.keyed_dropout.KeyedMask", "keyed_dropout.KeyedMask"),
        ("import repbend_kernels\nrepbend_kernels.blocks.RowReader", "blocks.RowReader"),
        ("from repbend_kernels import blocks\nblocks.RowReader", "blocks.RowReader"),
        (
            "from repbend_kernels.triton import row_distance as rows\nrows.launch_gradient",
            "triton.row_distance.launch_gradient",
        ),
        ("from repbend_kernels.triton import parts", "triton.parts"),
        ("import importlib\nimportlib.import_module('repbend_kernels.low_rank')", "low_rank"),
        ("from repbend_kernels.triton import row_distance as rows\nrows.WHOLE_ROW", None),
        ("from repbend_kernels import bend_tap, blocks\nblocks.row_hashes(bend_tap)", None),
        ("import repbend_kernels as k\nk.bend_tap, k.__file__, k.oracles.bend_tap_reference", None),
        ("from repbend_kernels import *", None),
    ],
)
def test_reaching_inside_is_noticed(code: str, name: str | None) -> None:
    found = list(dict.fromkeys(undeclared(code)))
    assert found[: 1 if name else None] == ([f"{NAME}.{name}"] if name else [])


def defined_ops(code: str) -> list[str]:
    """Ops that ``code`` registers, and autograd functions that it writes, by name."""
    found = []
    for node in ast.walk(ast.parse(code)):
        marks = (
            node.decorator_list
            if isinstance(node, ast.FunctionDef)
            else node.bases
            if isinstance(node, ast.ClassDef)
            else []
        )
        if any(mark in ast.unparse(expression) for expression in marks for mark in ("custom_op", "autograd.Function")):
            found.append(node.name)
    return found


def test_every_op_lives_in_the_package() -> None:
    found = {
        file.relative_to(ROOT): defined_ops(file.read_text(encoding="utf-8"))
        for file in (ROOT / "repbend_fast").rglob("*.py")
    }
    assert {file: names for file, names in found.items() if names} == {}
    assert defined_ops((PACKAGE / "rms_norm.py").read_text(encoding="utf-8")) == [
        "rms_norm_op",
        "rms_norm_gradient",
        "_RmsNorm",
    ]


def test_which_modules_are_declared() -> None:
    files = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in PACKAGE.rglob("*.py")]
    modules = {".".join(part for part in parts if part != "__init__") for parts in files}
    assert {module for module in modules if declared(module) is not None} == DECLARED


@pytest.mark.parametrize("module", sorted(DECLARED))
def test_what_is_declared_is_there(module: str) -> None:
    if ".triton" in module:
        pytest.importorskip("triton", reason="the kernels need Triton")
    names = declared(module) or ()
    for name in names:
        if is_module(module, name):
            importlib.import_module(f"{module}.{name}")
    assert names
    assert [name for name in names if not hasattr(importlib.import_module(module), name)] == []
