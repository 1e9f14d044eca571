"""The list of mutants fits the code, and the runner calls each by what became of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.faults import mutants
from benchmarks.faults.mutant import Mutant
from benchmarks.faults.mutant_list import MUTANTS

ROOT = Path(__file__).parents[2]
CODE = "def add(a, b):\n    return a + b\n\n\ndef wait():\n    return None\n\n\ndef unused(a):\n    return a * 2\n"
TESTS = "from repbend_fast import sums\n\n\ndef test_sums():\n    sums.wait()\n    assert sums.add(2, 3) == 5\n"


def change(name: str, old: str, new: str, **settings: object) -> Mutant:
    return Mutant(name, "repbend_fast/sums.py", old, new, ("tests/test_sums.py",), **settings)  # type: ignore[arg-type]


SYNTHETIC = [
    change("wrong", "a + b", "a - b"),
    change("unnoticed", "a * 2", "a * 3"),
    change("explained", "a * 2", "a * 4", unseen="nobody calls it"),
    change("crashing", "return None", "__import__('os').abort()"),
    change("seen after all", "a + b", "a", unseen="it was said to hide"),
    change("endless", "return None", "while True: pass"),
    change("ambiguous", "return", "yield"),
    Mutant(
        "testless",
        "repbend_fast/sums.py",
        "a + b",
        "a - b",
        ("tests/test_sums.py", "-k", "nothing"),
        unseen="for its baseline",
    ),
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of some lines with a list of its own."""
    files = {
        "repbend_fast/__init__.py": "",
        "repbend_fast/sums.py": CODE,
        "kernels/repbend_kernels/__init__.py": "",
        "tests/test_sums.py": TESTS,
        ".gitignore": "ignored\n",
        "ignored": "",
    }
    root = tmp_path / "project"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    monkeypatch.setattr(mutants, "ROOT", root)
    monkeypatch.setattr(mutants, "MUTANTS", SYNTHETIC[:5])
    # Most of a small test's time is the plugins that it does not need.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return root


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_patch_applies_once_and_changes_the_program(mutant: Mutant) -> None:
    path = ROOT / mutant.file
    mutants.mutated(path.read_text(encoding="utf-8"), mutant)
    files = [test for test in mutant.tests if test.startswith("tests")]
    assert files
    assert all((ROOT / test).exists() for test in files)


def test_names_are_unique_and_reasons_are_given() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.unseen is None or len(mutant.unseen) > 20 for mutant in MUTANTS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a * 5", "a", "occurs 0 times"),
        ("return", "yield", "occurs 3 times"),
        ("a + b", "a +", "no Python"),
        ("a + b", "(a + b)", "the same program"),
    ],
)
def test_patches_that_are_none(old: str, new: str, message: str) -> None:
    with pytest.raises(mutants.PatchError, match=message):
        mutants.mutated(CODE, change("any", old, new))


def test_a_run_over_a_list(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    assert mutants.main(["--jobs", "2", "--out", str(record)]) == 1
    printed = capsys.readouterr().out
    assert "3 killed, 1 not visible here, 1 survived, 0 faulty" in printed
    found = {row["name"]: (row["result"], row["note"]) for row in json.loads(record.read_text())["mutants"]}
    assert found == {
        "wrong": ("killed", "by tests/test_sums.py::test_sums"),
        "unnoticed": ("survived", "1 tests passed: tests/test_sums.py"),
        "explained": ("not visible here", "nobody calls it"),
        "crashing": ("killed", "crashed with SIGABRT"),
        "seen after all": (
            "killed",
            "by tests/test_sums.py::test_sums; the list says it could not be seen: it was said to hide",
        ),
    }
    assert {"hardware", "versions", "commit", "date"} <= json.loads(record.read_text()).keys()
    assert (project / "repbend_fast/sums.py").read_text() == CODE


def test_a_part_of_the_list_leaves_no_record(project: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert mutants.main(["--only", "wrong", "--only", "expl", "--jobs", "1", "--out", str(record)]) == 0
    assert not record.exists()
    assert mutants.main(["--only", "no such name"]) == 2


def test_a_test_that_fails_anyway_says_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "tests/test_sums.py").write_text(TESTS.replace("== 5", "== 6"))
    assert mutants.main(["--only", "wrong"]) == 2
    assert "these tests fail without a mutant" in capsys.readouterr().err
    (project / "tests/test_sums.py").write_text("import pytest\npytest.skip('no GPU', allow_module_level=True)\n")
    assert mutants.main(["--only", "wrong"]) == 2


@pytest.mark.parametrize(
    ("name", "result", "note"),
    [
        ("endless", "killed", "stopped after 3 s"),
        ("ambiguous", "faulty", "occurs 3 times"),
        ("testless", "faulty", "pytest ended with 5"),
    ],
)
def test_other_ends(project: Path, name: str, result: str, note: str) -> None:
    verdict = mutants.examine(project, next(m for m in SYNTHETIC if m.name == name), limit=3)
    assert verdict.result == result
    assert note in verdict.note
    assert (project / "repbend_fast/sums.py").read_text() == CODE


def test_copies_have_what_git_does_not_ignore(project: Path, tmp_path: Path) -> None:
    for copy in mutants.copies_of(project, tmp_path / "copies", 2):
        assert {path.name for path in copy.iterdir()} == {".gitignore", "repbend_fast", "kernels", "tests"}
