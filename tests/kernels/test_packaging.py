"""The ops are a distribution of their own: what it declares, what its wheel holds, and that it runs beside
torch alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from test_import import BLOCK

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
PROJECT = tomllib.loads((KERNELS / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SMOKE = f"""{BLOCK}
import runpy
runpy.run_path({str(ROOT / "tests" / "kernels" / "smoke.py")!r}, run_name="__main__")
"""


def test_it_asks_for_torch_alone() -> None:
    assert PROJECT["name"] == "repbend-kernels"
    assert [re.split(r"\W", requirement)[0] for requirement in PROJECT["dependencies"]] == ["torch"]


def metadata(folder: Path, hook: str, out: Path) -> str:
    """The METADATA that ``folder``'s build backend writes, without pip and without a network."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(out)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The wheel's files, unpacked; built of a copy, so that nothing is left in the clone."""
    setuptools = pytest.importorskip("setuptools", reason="building needs setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("building needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(KERNELS, folder / "kernels", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    wheel = folder / metadata(folder / "kernels", "build_wheel", folder)
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


def test_its_wheel_holds_the_package_and_nothing_else(site: Path) -> None:
    code = {path.relative_to(KERNELS).as_posix() for path in (KERNELS / "repbend_kernels").rglob("*.py")}
    held = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert {name for name in held if ".dist-info/" not in name} == code
    assert "repbend_kernels/triton/row_distance.py" in code
    (text,) = (path.read_text(encoding="utf-8") for path in site.glob("*.dist-info/METADATA"))
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.11"]


def test_its_smoke_part_runs_beside_torch_alone(site: Path) -> None:
    path = os.pathsep.join([str(site), str(ROOT / "tests" / "support")])
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "REPBEND_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", SMOKE], cwd=site, env=env | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert re.fullmatch(r"\d+ calls right", done.stdout.strip()), done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("clone", [True, False], ids=["clone", "source distribution"])
def test_the_trainer_asks_for_the_ops(site: Path, tmp_path: Path, clone: bool) -> None:
    """In a clone for those beside it, so that ``pip install .`` needs no index for them; elsewhere for
    their version.
    """
    (tmp_path / "project").mkdir()
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "recipes",
        "repbend_fast",
        *(["kernels"] if clone else []),
    ):
        (tmp_path / "project" / name).symlink_to(ROOT / name)
    folder = metadata(tmp_path / "project", "prepare_metadata_for_build_wheel", tmp_path)
    text = (tmp_path / folder / "METADATA").read_text(encoding="utf-8")
    (asked,) = re.findall(r"^Requires-Dist: repbend-kernels ?(.*)$", text, flags=re.MULTILINE)
    assert asked == (f"@ {KERNELS.resolve().as_uri()}" if clone else f"=={PROJECT['version']}")
    assert f"\nVersion: {PROJECT['version']}\n" in text
    assert "repbend_kernels" not in (tmp_path / folder / "top_level.txt").read_text(encoding="utf-8")
