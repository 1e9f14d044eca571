from __future__ import annotations

from pathlib import Path

import pytest
from tiny_comparison import InProcess, TinyComparison
from tiny_run import write_model

from repbend_fast.compare import picture, process


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tiny(tiny_model: Path, tmp_path: Path) -> TinyComparison:
    """Two recipes, ``bend.yaml`` and ``rmu.yaml``; nothing has been trained yet."""
    return TinyComparison(tiny_model, tmp_path)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """Runs of the comparison in this process: a second each, instead of ten with the imports of a new one."""
    stand_in = InProcess()
    monkeypatch.setattr(picture, "DPI", 30)
    monkeypatch.setattr(process, "run_command", stand_in)
    return stand_in
