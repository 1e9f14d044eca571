"""Runs in units of the reference, with the KL's weight from a limit, and with a window that follows the
model's depth.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from host_syncs import watched_steps
from tiny_run import BLOCKS, TinyRun, adapter_of, reproducible, rows, same_tensors

from repbend_fast.cli import main
from repbend_fast.config import load_config
from repbend_fast.errors import UserError
from repbend_fast.objectives import HeadKL, Stream
from repbend_fast.objectives.npo import NPOConfig
from repbend_fast.objectives.repbend import RepBendConfig
from repbend_fast.step import StreamResult, StreamRunner
from repbend_fast.training.dual import KLWeight
from repbend_fast.training.trainer import train

SETTINGS = (
    "objective.distance_unit=reference",
    "objective.window=auto",
    "objective.kl_limit=0.5",
    "objective.kl_rate=0.2",
)


@pytest.fixture(scope="module")
def bent(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A finished run with all three. To be copied, not changed."""
    run = TinyRun(tiny_model, tmp_path_factory.mktemp("bent"))
    assert run.train(*SETTINGS).exit_code == 0
    return run


def test_units_are_kept_in_the_folder_and_the_checkpoint(bent: TinyRun) -> None:
    units = json.loads((bent.path / "units.json").read_text(encoding="utf-8"))
    # The window, and every hidden state that the safe term reads.
    assert list(units) == [str(layer) for layer in range(1, BLOCKS + 1)]
    assert all(unit > 0 for unit in units.values())
    state = json.loads((bent.path / "checkpoints" / "step-000006" / "state.json").read_text(encoding="utf-8"))
    assert state["units"] == units
    assert [row["event"] for row in rows(bent.path, "event")].count("units") == 1


def test_a_resumed_run_takes_the_units_and_the_weight_of_its_checkpoint(
    bent: TinyRun, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.train(*SETTINGS)
    shutil.rmtree(tiny.path / "checkpoints" / "step-000006")
    monkeypatch.setattr(StreamRunner, "reference_rows", lambda *_: pytest.fail("the units were measured again"))
    assert tiny.resume().exit_code == 0
    assert [row["reason"] for row in rows(tiny.path, "event") if row["event"] == "resumed"] == ["step-000004"]
    assert reproducible(tiny.path) == reproducible(bent.path)
    assert same_tensors(adapter_of(tiny.path), adapter_of(bent.path))


def test_a_run_goes_on_in_its_own_unit_only(bent: TinyRun) -> None:
    config = load_config(str(bent.path / "config.yaml"), ["objective.distance_unit=state", "training.steps=8"])
    with pytest.raises(
        UserError, match=r"cannot resume: objective\.distance_unit=state, but the checkpoint was written with reference"
    ):
        train(config, bent.path)


def test_a_limit_that_is_switched_off_is_said(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.train(*SETTINGS).exit_code == 0
    assert tiny.resume("objective.kl_limit=null", "training.steps=7").exit_code == 0
    assert "objective.kl_limit is off from here on" in capsys.readouterr().out
    assert "kl_weight" not in rows(tiny.path, "step")[-1]


def test_the_weight_follows_the_terms_that_are_logged(bent: TinyRun) -> None:
    weight, seen = 0.3, []
    for row in rows(bent.path, "step"):
        assert row["kl_weight"] == pytest.approx(weight, rel=1e-6)
        weight = min(3.0, max(0.0, weight + 0.2 * (row["terms"]["kl"] - 0.5)))
        seen.append(row["kl_weight"])
        loss = sum(
            w * row["terms"][name]
            for name, w in {"safe": 0.5, "unsafe": -0.5, "cosine": 0.1, "kl": row["kl_weight"]}.items()
        )
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert len(set(seen)) == 6
    state = json.loads((bent.path / "checkpoints" / "step-000006" / "state.json").read_text(encoding="utf-8"))
    assert state["kl_weight"] == pytest.approx(weight, rel=1e-6)


def test_a_window_by_depth_is_written_as_numbers(bent: TinyRun) -> None:
    objective = load_config(str(bent.path / "config.yaml")).objective
    assert isinstance(objective, RepBendConfig)
    assert (objective.window_start, objective.window_size) == (2, 1)


def test_a_step_with_a_limit_waits_once(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = watched_steps(monkeypatch)
    tiny.train(*SETTINGS, "training.steps=4", "training.log_every=4", "validation.every=0", "training.warmup_steps=0")
    _, first, second, _ = waits
    assert len(first) == len(second) == 1, first + second
    assert [row["step"] for row in rows(tiny.path, "step")] == [4]


def test_npo_and_crl_have_a_limit_too(tiny: TinyRun) -> None:
    base = ("training.steps=2", "validation.every=0")
    assert tiny.train(*base, "objective.name=npo", "objective.retain_kl=0.5", "objective.kl_limit=0.1").exit_code == 0
    assert [row["kl_weight"] for row in rows(tiny.path, "step")] == [
        0.5,
        pytest.approx(0.475),
    ]  # K is 0 at the start: 5 % less
    assert tiny.train(*base, "objective.name=crl", "objective.window=auto", "objective.kl_limit=0.1").exit_code == 0
    assert rows(tiny.path, "step")[1]["kl_weight"] == pytest.approx(0.665)


def test_the_weight_stays_within_its_bounds_and_ignores_what_is_not_finite() -> None:
    weight = KLWeight.of(RepBendConfig(kl=1.0, kl_limit=0.5))
    assert weight is not None
    assert (weight.value, weight.rate, weight.highest) == (1.0, pytest.approx(0.1), 10.0)
    for kl, expected in ((1.5, 1.1), (0.5, 1.1), (float("nan"), 1.1), (float("inf"), 1.1), (0.0, 1.05), (1e9, 10.0)):
        weight.update(kl)
        assert weight.value == pytest.approx(expected)
    for _ in range(300):
        weight.update(0.0)
    assert weight.value == 0.0
    head = HeadKL("kl", (), 1.0, 1.0, 1.0)
    stream = weight.weigh(Stream("retain", (), (head,)))
    # A weight of 0 still measures its term, or it could never rise again.
    assert stream.term("kl") is not None
    assert stream.term("kl").weight == 0.0
    measured = weight.measured(
        [stream, Stream("x", ())], [StreamResult(torch.zeros(()), {"kl": torch.tensor(3.0)})] * 2, 2
    )
    assert measured is not None
    assert float(measured) == 1.5
    assert KLWeight.of(RepBendConfig()) is None
    assert KLWeight.of(NPOConfig(retain_kl=0.5)) is None


def test_a_weight_of_zero_rises_again(tiny: TinyRun) -> None:
    """K is 0 at the start, so that so fast a weight falls to 0 at once; then K grows."""
    tiny.train("training.steps=4", "validation.every=0", "objective.kl_limit=1e-3", "objective.kl_rate=300")
    weights = [row["kl_weight"] for row in rows(tiny.path, "step")]
    assert weights[1] == 0.0
    assert max(weights[2:]) > 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["kl=0", "kl_limit=0.1"], "objective.kl_limit=0.1 needs a weight to start from; set objective.kl above 0"),
        (["objective.name=npo", "kl_limit=0.1"], "needs a weight to start from; set objective.retain_kl above 0"),
        (
            ["kl=5.0", "kl_limit=0.1", "kl_max=2.0"],
            "objective.kl_max=2 is less than objective.kl=5, where the weight starts",
        ),
        (["kl_limit=0"], "kl_limit=0: objective.kl_limit must be a number of more than 0, or null"),
        (["distance_unit=metre"], "objective.distance_unit must be one of state, reference"),
        (["objective.window=20"], "objective.window=20: must be auto; numbers go into window_start and window_size"),
    ],
)
def test_settings_that_cannot_be_are_one_line(tiny: TinyRun, overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny.config(*overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_beyond_the_model_is_still_refused_before_weights(
    tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny.recipe), "window_start=9", "window_size=auto"]) == 2
    assert "hidden states 0 … 3" in capsys.readouterr().err


def test_a_dry_run_says_auto(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tiny.recipe), "window=auto", "--dry-run"]) == 0
    assert "window_start: auto" in capsys.readouterr().out
