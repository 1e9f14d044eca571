"""Which way the house looks: a room imports from the rooms above it and from itself. ``docs/architecture.md`` has the
list and its reasons.

Imports inside functions and those for types alone count like any other, and so does a module named to
``import_module``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "repbend_fast"
GROUND = "ground"
"""The single files of the package that no list names, which every room may use."""
ROOMS = (
    GROUND,
    *("distributed", "data", "objectives", "config", "models", "step", "planning", "runs", "evaluation", "report"),
    *("training", "integration", "assessment", "making", "exports", "serving", "verify", "compare", "api", "cli"),
)
ROOF = "__init__"
"""The package's own file: what users import from, with ``__main__``, which is the command line. It may use every room,
and no room may use it.
"""
FOLDERS_OF_TESTS = {*ROOMS[1:], "benchmarks", "golden", "kernels", "support"}

Sources = Mapping[str, str]
"""Python files by their path inside of the package, with forward slashes."""


def sources() -> dict[str, str]:
    folder = ROOT / PACKAGE
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))
    }


def room_of(path: str) -> str:
    first, _, rest = path.partition("/")
    alone = path.removesuffix(".py").replace("__main__", ROOF)
    return first if rest else alone if alone in (ROOF, *ROOMS) else GROUND


def imported(path: str, text: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name, without the package's, of everything that the file takes from the package."""
    here = (PACKAGE, *path.split("/")[:-1])
    for node in ast.walk(ast.parse(text)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) + 1 - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            found = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE:
            found = [f"{PACKAGE}.{node.attr}"]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found = [str(node.args[0].value)] if called in ("import_module", "__import__") else []
        yield from ((node.lineno, name.removeprefix(f"{PACKAGE}.")) for name in found if name.startswith(f"{PACKAGE}."))


def room_named(name: str, files: Sources) -> str | None:
    """The room that a dotted name leads to; None for what every module has, such as ``__version__``."""
    first = name.split(".")[0]
    if first in ROOMS[1:] or any(path.startswith(f"{first}/") for path in files):
        return first
    return GROUND if f"{first}.py" in files else None if re.fullmatch(r"__\w+__", first) else ROOF


def uses(files: Sources) -> Iterator[tuple[str, str, str]]:
    """For each import that leaves its room: from, to, and ``path:line: name``."""
    for path, text in files.items():
        for line, name in imported(path, text):
            target = room_named(name, files)
            if target is not None and target != room_of(path):
                yield room_of(path), target, f"{path}:{line}: {name}"


def looks_down(files: Sources) -> list[str]:
    floors = [*ROOMS, ROOF]
    return [where for room, target, where in uses(files) if floors.index(target) > floors.index(room)]


def cycle(files: Sources) -> list[str]:
    """Rooms that use each other in a ring; empty where there is none."""
    below: dict[str, set[str]] = {}
    for room, target, _ in uses(files):
        below.setdefault(room, set()).add(target)

    def ring(way: list[str]) -> list[str]:
        if way[-1] in way[:-1]:
            return way[way.index(way[-1]) :]
        return next(filter(None, (ring([*way, following]) for following in sorted(below.get(way[-1], ())))), [])

    return next(filter(None, (ring([room]) for room in sorted(below))), [])


def equal_names(files: Sources) -> list[str]:
    """Files of one name in two rooms: who looks for one finds the other."""
    by_name: dict[str, set[str]] = {}
    for path in files:
        by_name.setdefault(path.rsplit("/", 1)[-1], set()).add(room_of(path))
    return [name for name, rooms in by_name.items() if len(rooms) > 1 and not name.startswith("__")]


def test_every_folder_is_a_room() -> None:
    assert {room_of(path) for path in sources()} == {*ROOMS, ROOF}


def test_no_room_looks_down() -> None:
    assert looks_down(sources()) == []


def test_no_rooms_use_each_other_in_a_ring() -> None:
    assert cycle(sources()) == []


def test_no_two_rooms_have_files_of_one_name() -> None:
    assert equal_names(sources()) == []


def test_the_kernels_know_nothing_of_the_house() -> None:
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        assert PACKAGE not in {name.split(".")[0] for name in _imported_anywhere(path)}, path


def test_architecture_lists_the_rooms_in_this_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text, re.MULTILINE)
    assert tuple(rows) == ROOMS[1:]


def test_every_file_that_architecture_names_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"\b(?:\w+/)+\w+\.py\b", text)
    assert len(named) > 25
    assert [name for name in named if not any((folder / name).is_file() for folder in (ROOT, ROOT / PACKAGE))] == []


def test_tests_mirror_the_rooms_and_share_through_one_path() -> None:
    tests = ROOT / "tests"
    assert {
        path.relative_to(tests).parts[0] for path in tests.rglob("*.py") if path.parent != tests
    } <= FOLDERS_OF_TESTS
    for path in sorted(tests.rglob("*.py")):
        edits = [
            n.lineno
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.Attribute) and _is_sys_path(n)
        ]
        assert not edits, f"{path}: {edits}: sys.path; `pythonpath` in pyproject.toml names the folders"


def _is_sys_path(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "path"
        and isinstance(node.value, ast.Name)
        and node.value.id == "sys"
    )


def _imported_anywhere(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("step/runner.py", "from repbend_fast.planning.planner import Planner"),
        ("step/runner.py", "import repbend_fast.planning"),
        ("step/runner.py", "from repbend_fast import planning"),
        ("step/runner.py", "from ..planning import planner"),
        ("step/runner.py", "def plan():\n    from repbend_fast.planning import planner"),
        ("step/runner.py", "if TYPE_CHECKING:\n    from repbend_fast.planning import planner"),
        ("step/runner.py", "importlib.import_module('repbend_fast.planning.planner')"),
        ("step/runner.py", "import repbend_fast\nrepbend_fast.planning.planner"),
        ("models/layers/lora.py", "from repbend_fast.step import levers"),
        ("models/layers/lora.py", "from ...step import levers"),
        ("errors.py", "from repbend_fast.data import records"),
        ("cli/parser.py", "from repbend_fast import train"),
        ("cli/parser.py", "import repbend_fast\nrepbend_fast.train()"),
    ],
)
def test_a_look_down_is_found(path: str, text: str) -> None:
    assert len(looks_down({path: text})) == 1
    whole = sources()
    assert len(looks_down({**dict.fromkeys(whole, ""), path: f"{whole[path]}\n{text}\n"})) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("planning/peaks.py", "from repbend_fast.step import StreamRunner"),
        ("models/load.py", "from repbend_fast.models.layers import lora\nfrom . import decoder"),
        ("models/layers/lora.py", "from ..decoder import run_decoder\nfrom ...data import records"),
        ("environment.py", "import repbend_fast\nrepbend_fast.__version__\nfrom repbend_fast import __version__"),
        ("__init__.py", "from repbend_fast.training.trainer import train"),
        ("data/sources.py", "import json\nfrom os import path\nimportlib.import_module('json')"),
    ],
)
def test_looking_up_is_free(path: str, text: str) -> None:
    assert looks_down({path: text}) == []


def test_a_ring_is_found_whatever_the_order() -> None:
    ring = {
        "data/a.py": "from repbend_fast.models import x",
        "models/b.py": "def f():\n    import repbend_fast.step.c",
        "step/c.py": "from ..data import a",
    }
    assert set(cycle(ring)) == {"data", "models", "step"}
    assert cycle({**ring, "step/c.py": "from . import d"}) == []


def test_equal_names_are_found() -> None:
    assert equal_names(
        {"data/load.py": "", "models/layers/load.py": "", "models/__init__.py": "", "step/__init__.py": ""}
    ) == ["load.py"]
    assert equal_names({"models/base.py": "", "models/layers/base.py": ""}) == []


def test_no_two_benchmarks_have_one_name() -> None:
    names = [path.name for path in (ROOT / "benchmarks").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))
