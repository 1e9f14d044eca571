"""Nobody but the terms and the methods themselves asks what kind a term is, or what a method is called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from repbend_kernels import KINDS

from repbend_fast.objectives import terms
from repbend_fast.objectives.registry import OBJECTIVES, SETTINGS
from repbend_fast.objectives.terms import DISTANCE_KINDS, Term

ROOT = Path(__file__).parents[1]
AT_HOME = ("repbend_fast/objectives/", "repbend_fast/step/terms/")
FIELDS = {"distances", "pairwise", "triplets", "head", "answers"}
"""What a stream's terms were kept in by their kinds."""
OF_A_STREAM = {"head", "answers"}
"""Fields that other things have too."""


def kinds(base: type = Term) -> set[str]:
    """Every kind of term that ships, by class name."""
    below = {
        name
        for kind in base.__subclasses__()
        if kind.__module__.startswith(f"{terms.__name__}.")
        for name in (kind.__name__, *kinds(kind))
    }
    return below | {terms.Triplet.__name__}


def names_of_methods() -> set[str]:
    return {*OBJECTIVES, *(c.__name__ for c in (*OBJECTIVES.values(), *SETTINGS.values()))}


def asked(text: str) -> Iterator[str]:
    """``line: what`` for each place that asks for a kind of term or for a method."""
    methods, classes = names_of_methods(), kinds()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and node.value in methods:
            yield f"{node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Attribute) and node.attr in FIELDS:
            if node.attr not in OF_A_STREAM or "stream" in ast.unparse(node.value).lower():
                yield f"{node.lineno}: .{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("Stream", "replace"):
            yield from (f"{node.lineno}: {keyword.arg}=" for keyword in node.keywords if keyword.arg in FIELDS)
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            yield from (f"{node.lineno}: {alias.name}" for alias in node.names if alias.name in classes | methods)
        elif isinstance(node, ast.Name) and node.id in classes | methods:
            yield f"{node.lineno}: {node.id}"


def test_nobody_else_asks() -> None:
    found = []
    for path in sorted((ROOT / "repbend_fast").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(AT_HOME):
            found += [f"{name}:{place}" for place in asked(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "stream.head",
        "self.stream.answers.beta",
        "large.triplets",
        "any(term.against for term in stream.distances)",
        "replace(stream, head=None)",
        "Stream('s', (), pairwise=term)",
        "if config.objective.name == 'crl': pass",
        "TITLES = {'rmu': 1}",
        "from repbend_fast.objectives import HeadKL",
        "isinstance(term, PairwiseCosine)",
        "from repbend_fast.objectives.rmu import RMUConfig",
    ],
)
def test_a_question_is_found(text: str) -> None:
    assert list(asked(text))


@pytest.mark.parametrize(
    "text", ["runner.head", "lengths.answers", "'runs/repbend'", "stream.terms", "def distances(run): pass"]
)
def test_other_words_are_free(text: str) -> None:
    assert list(asked(text)) == []


def test_the_kinds_of_distance_are_the_op_s() -> None:
    assert set(DISTANCE_KINDS) == set(KINDS)
    assert kinds() >= {"Distance", "PairwiseCosine", "Triplets", "Triplet", "HeadKL", "AnswerLoss"}
