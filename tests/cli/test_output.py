"""``--quiet`` and ``--json``: silence while a command works, and one JSON value at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from record_files import write_lines

from repbend_fast import api
from repbend_fast.cli import main
from repbend_fast.console import Say
from repbend_fast.evaluation.sides import Evaluation

RATES = {"attack_direct": 0.25, "samples": [{"answer": "long"}]}
Recorder = Callable[..., object]


def speaking(result: object) -> Recorder:
    """A function of the API that says a line where it is heard."""

    def call(*arguments: object, say: Say | None, **options: object) -> object:
        if say is not None:
            say("working")
        return result

    return call


@pytest.fixture
def run(tmp_path: Path) -> api.Run:
    (tmp_path / "evaluation.json").write_text(json.dumps({"before": RATES, "after": RATES}))
    return api.Run(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: api.Run) -> None:
    monkeypatch.setattr(api, "train", speaking(run))
    assert printed(capsys, "train", "demo") == "working\n"
    assert printed(capsys, "train", "demo", "--quiet", "steps=3") == ""
    found = json.loads(printed(capsys, "train", "demo", "--json", "steps=3"))
    assert found == {
        "folder": str(run.folder),
        "adapter": str(run.adapter),
        "interrupted": False,
        "before": {"attack_direct": 0.25},
        "after": {"attack_direct": 0.25},
    }


def test_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(api, "evaluate", speaking(Evaluation(RATES, None, Path("e.json"))))
    assert printed(capsys, "eval", "demo") == "working\n"
    assert printed(capsys, "eval", "--quiet", "demo") == ""
    found = json.loads(printed(capsys, "eval", "demo", "--json"))
    assert found == {"before": {"attack_direct": 0.25}, "after": None, "file": "e.json"}


def test_eval_with_suites(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from repbend_fast.assessment.run import Assessment

    monkeypatch.setattr(api, "assess", speaking(Assessment(Path("x"), {"groups": []})))  # type: ignore[typeddict-item]
    assert printed(capsys, "eval", "demo", "--suite", "demo") == "working\n"
    assert printed(capsys, "eval", "demo", "--suite", "demo", "--quiet") == ""
    assert json.loads(printed(capsys, "eval", "demo", "--suite", "demo", "--json")) == {"groups": []}


def test_data_make(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine-made.json").write_text('{"records": {}}')
    monkeypatch.setattr(api, "make_data", speaking(tmp_path / "mine-overlay.yaml"))
    words = ("data", "make", "harbour", "--model", "demo", "--out", "x")
    assert printed(capsys, *words) == "working\n"
    assert printed(capsys, *words, "--quiet") == ""
    found = json.loads(printed(capsys, *words, "--json"))
    assert found == {"overlay": str(tmp_path / "mine-overlay.yaml"), "records": {}}


def test_data_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    safe = {"role": "safe", "prompt": "How?", "answer": "So."}
    path = write_lines(tmp_path / "d.jsonl", [safe, safe, {"role": "safe"}])
    assert main(["data", "check", str(path), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["data"]
    assert found["records"]["safe"] == 2
    assert found["bad"] == [{"origin": f"{path}:3", "reason": "missing field `prompt`"}]
    assert found["notes"][0].startswith("1 safe record is an exact copy")
    assert found["sources"][0]["rows"] == 3


def test_compare_is_quiet_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from repbend_fast import compare
    from repbend_fast.console import say

    def run_compare(*arguments: object) -> int:
        say("comparing")
        return 0

    monkeypatch.setattr(compare, "run_compare", run_compare)
    monkeypatch.setattr(compare, "load_comparison", lambda *a, **k: None)
    assert printed(capsys, "compare") == "comparing\n"
    assert printed(capsys, "compare", "--quiet") == ""
