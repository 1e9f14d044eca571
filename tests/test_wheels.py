"""Both wheels, away from the clone: what they hold, what they ask for, and that the command runs from them alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
HELP = """
import os, sys
from pathlib import Path
import repbend_fast
from repbend_fast.cli import main
assert Path(repbend_fast.__file__).is_relative_to(sys.argv[1]), repbend_fast.__file__
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "transformers", "numpy", "datasets", "matplotlib", "rich", "pydantic", "yaml"} & set(sys.modules)
assert not heavy, heavy
seconds = sum(os.times()[:2])
assert seconds < 0.3, seconds
"""
RUNS = """
import repbend_kernels
from repbend_fast import load_config
from repbend_fast.data.sources import load_records
from repbend_fast.cli import main
config = load_config("demo", overlays=["qlora"])
records = load_records(config.data, seed=0, skip_bad_records=False).counts()
assert min(records.values()) > 0, records
from repbend_fast.report import page
assert main(["recipes", "show", "demo"]) == 0
assert main(["train", "demo", "--dry-run"]) == 0
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Built of copies, so that nothing is left in the clone."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("wheels")
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".venv")
    for name in ("repbend_fast", "recipes", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    for name in ("setup.py", "README.md", "LICENSE", "pyproject.toml"):
        shutil.copyfile(ROOT / name, folder / name)
    found = []
    for place in (folder / "kernels", folder):
        command = [sys.executable, "-W", "ignore", "-c", BUILD, str(folder)]
        environment = {**os.environ, "REPBEND_RELEASE": "1"}
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(folder / done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def site(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder)
    return folder


def test_every_file_of_the_package_and_every_recipe_is_in_the_wheel(wheels: list[Path]) -> None:
    package = [
        path for path in (ROOT / "repbend_fast").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    expected = {path.relative_to(ROOT).as_posix() for path in package}
    recipes = [path for path in (ROOT / "recipes").rglob("*") if path.suffix in (".py", ".yaml")]
    expected |= {f"repbend_fast/recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" for path in recipes}
    held = {name for name in zipfile.ZipFile(wheels[1]).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_they_ask_for_each_other_and_for_no_folder(site: Path) -> None:
    found = {}
    for path in site.glob("*.dist-info/METADATA"):
        parsed = Parser().parsestr(path.read_text(encoding="utf-8"))
        found[parsed["Name"]] = parsed
    assert not [line for each in found.values() for line in each.get_all("Requires-Dist") if "file:" in line]
    wanted = f"repbend-kernels=={found['repbend-kernels']['Version']}"
    assert wanted in found["repbend-fast"].get_all("Requires-Dist")
    assert {"tensorboard", "wandb", "trackio", "lm-eval"} <= set(found["repbend-fast"].get_all("Provides-Extra"))
    assert "repbend-fast = repbend_fast.cli:main" in next(site.glob("*/entry_points.txt")).read_text(encoding="utf-8")


@pytest.mark.parametrize("code", [HELP, RUNS], ids=["help is quick", "recipes and demo data are there"])
def test_they_run_away_from_the_clone(code: str, site: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    here = tmp_path / "here"
    here.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)],
        cwd=here,
        env={**environment, "PYTHONPATH": str(site), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(here.iterdir())
