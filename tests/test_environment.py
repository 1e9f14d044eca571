"""One form for where a record was made, and a commit that is the project's own."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from repbend_fast import environment
from repbend_fast.cli import main

ROOT = Path(__file__).parents[1]


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_every_record_has_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.environment is environment.environment
    found = environment.environment()
    assert list(found) == ["hardware", "device", "threads", "versions", "machine", "implementations", "commit", "date"]
    assert {"python", "torch", "transformers", "repbend-fast"} <= set(found["versions"])
    assert main(["env", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(found)
    assert main(["env"]) == 0
    assert f"commit  {found['commit']}\n" in capsys.readouterr().out


def test_nothing_else_asks_for_a_commit() -> None:
    files = [path for folder in ("repbend_fast", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if "rev-parse" in path.read_text(encoding="utf-8")] == ["environment.py"]


def test_the_commit_is_the_checkouts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "first")
    installed = tmp_path / "venv" / "site-packages"
    installed.mkdir(parents=True)
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path.resolve())
    assert environment.commit() == git(tmp_path, "rev-parse", "--short", "HEAD")
    monkeypatch.setattr(environment, "CHECKOUT", installed.resolve())
    assert environment.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc123")
    assert environment.commit() == "abc123"


def test_a_bug_report_names_nobody_and_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home" / "gwendolyn"
    home.mkdir(parents=True)
    for name in ("HOME", "USER", "LOGNAME", "HOSTNAME", "VIRTUAL_ENV", "HF_HOME", "PYTHONPATH"):
        monkeypatch.setenv(name, f"{home}-{name}" if name.isupper() else name)
    monkeypatch.chdir(home)
    assert main(["env", "--json"]) == 0
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    for secret in ("gwendolyn", str(ROOT), sys.prefix, "/site-packages"):
        assert secret not in said, secret
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", said)
    assert re.findall(r"(?<![\w.])/(?:\w+/)+", said) == []
