"""Fixtures of tests that train: a tiny model, a recipe on it, a finished run. A ``conftest.py`` imports those that its
tests use.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import TinyRun, write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tiny(tiny_model: Path, tmp_path: Path) -> TinyRun:
    """A recipe of a run of a second; nothing has been trained yet."""
    return TinyRun(tiny_model, tmp_path)


@pytest.fixture(scope="session")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A finished run that nothing interrupted. To be copied, not changed."""
    run = TinyRun(tiny_model, tmp_path_factory.mktemp("whole"))
    assert run.train().exit_code == 0
    return run
