"""Trackers get the numbers of ``metrics.jsonl``, go on where a run goes on, need no network, and never stop a run."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from tiny_run import TinyRun, adapter_of, rows, same_tensors

from repbend_fast.cli import main

NAMES = ("tensorboard", "wandb", "trackio")
Install = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(name, fails=…)`` puts a stand-in for a library there; returns what it is called with."""

    def make(name: str, fails: str = "") -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def called(what: str) -> Callable[..., None]:
            def call(*arguments: Any, **named: Any) -> None:
                calls.append((what, arguments, named))
                if what == fails:
                    raise RuntimeError("out of order")

            return call

        module: Any = types.ModuleType(name)
        module.init, module.log, module.finish = called("init"), called("log"), called("finish")
        monkeypatch.setitem(sys.modules, name, module)
        if name == "tensorboard":
            writer = type("SummaryWriter", (), {})
            writer.__init__ = lambda self, *a, **k: called("init")(*a, **k)
            for method in ("add_scalar", "flush", "close"):
                setattr(writer, method, staticmethod(called(method)))
            board: Any = types.ModuleType("torch.utils.tensorboard")
            board.SummaryWriter = writer
            monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
        return calls

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return make


def test_every_number_goes_to_each_tracker(install: Install, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny.folder))
    calls = {name: install(name) for name in NAMES}
    assert (
        main(["train", str(tiny.recipe), "training.steps=2", "warmup_steps=1", f"--report_to={json.dumps(NAMES)}"]) == 0
    )
    steps = {row["step"]: row for row in rows(tiny.path, "step")}
    [validation, *_] = rows(tiny.path, "validation")
    for name in ("wandb", "trackio"):
        begun, *logged, ended = calls[name]
        assert (begun[0], ended[0]) == ("init", "finish")
        assert begun[2]["project"] == "repbend-fast"
        assert begun[2]["config"]["training"]["steps"] == 2
        assert str(tiny.model) not in json.dumps(begun[2]["config"])
        got = {(key, call[2]["step"]): value for call in logged for key, value in call[1][0].items()}
        assert got["train/loss", 2] == steps[2]["loss"]
        assert got["train/terms/kl", 1] == steps[1]["terms"]["kl"]
        assert got["validation/kl", 0] == validation["kl"]
    assert calls["wandb"][0][2]["mode"] == "offline"
    scalars = {call[1][::2]: call[1][1] for call in calls["tensorboard"] if call[0] == "add_scalar"}
    assert scalars["train/loss", 2] == steps[2]["loss"]
    assert calls["tensorboard"][0][1] == (str(tiny.path / "tensorboard"),)
    assert calls["tensorboard"][-1][0] == "close"


def test_a_resumed_run_goes_on_in_the_same_curve(
    install: Install, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    calls, board = install("wandb"), install("tensorboard")
    wanted = "output.report_to=[wandb, tensorboard]"
    assert main(["train", str(tiny.recipe), "training.steps=2", "warmup_steps=1", wanted]) == 0
    assert main(["train", "--resume", str(tiny.path), "training.steps=4"]) == 0
    first, second = (call[2] for call in calls if call[0] == "init")
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert "mode" not in first
    assert [call[2] for call in board if call[0] == "init"] == [{"purge_step": None}, {"purge_step": 3}]
    assert main(["train", str(tiny.recipe), "training.steps=2", "warmup_steps=1", wanted]) == 0
    assert [call[2] for call in calls if call[0] == "init"][-1]["id"] != first["id"]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_left_out(
    fails: str, install: Install, whole: TinyRun, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = install("trackio", fails=fails)
    assert main(["train", str(tiny.recipe), "output.report_to=[trackio]"]) == 0
    err = capsys.readouterr().err
    assert err.count("note: output.report_to: trackio failed and is left out (out of order)") == 1
    assert [call[0] for call in calls].count(fails) == 1
    assert same_tensors(adapter_of(tiny.path), adapter_of(whole.path))
    assert len(rows(tiny.path, "step")) == 6


@pytest.mark.parametrize("name", NAMES)
def test_a_library_that_is_not_there_is_said_before_weights_are_loaded(
    name: str, tiny: TinyRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repbend_fast.training.trainer.load_model", lambda config: pytest.fail("weights were loaded"))
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    assert main(["train", str(tiny.recipe), f"output.report_to=[{name}]"]) == 2
    err = capsys.readouterr().err
    assert f"output.report_to: {name} is not installed" in err
    assert f"pip install 'repbend-fast[{name}]'" in err
    assert err.count("\n") == 1
    assert not tiny.path.exists()


def test_without_one_nothing_is_imported(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    assert main(["train", str(tiny.recipe), "training.steps=1", "warmup_steps=0"]) == 0
    assert not (tiny.path / "tracking.json").exists()
