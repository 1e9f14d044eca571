"""What trainings of the model got is told, whether they count as attacks or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_evaluation_bars import plain
from test_report import checked, step_row, write_run

from repbend_fast.report import write_report
from repbend_fast.report.plots import FIGURES
from repbend_fast.report.relearned import relearned, uncounted_lines
from repbend_fast.report.run_record import RunRecord, read_run


def training(side: str, kind: str, comply: float, ratio: float | None) -> dict[str, Any]:
    curve = [{"step": 8, "comply": comply, "perplexity_ratio": ratio}]
    return {"side": side, "suite": "fiction", "kind": kind, "records": 16, "curve": curve}


def run_with(folder: Path, *trainings: dict[str, Any], bound: float | None = 1.5) -> RunRecord:
    summary = {"bound": bound, "start": {"comply": 0.25}}
    changes = [{"side": side, "suite": "fiction", "summary": summary} for side in ("base", "bent")]
    write_run(folder, [step_row(1)])
    (folder / "eval").mkdir()
    content = {"relearning": list(trainings), "changes": changes if bound else []}
    (folder / "eval" / "eval.json").write_text(json.dumps(content), encoding="utf-8")
    return read_run(folder)


def test_an_attacker_starts_from_the_model_before_and_the_strongest_comes_first(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", training("base", "harmful", 1.0, 1.7), training("bent", "benign", 0.5, 1.0))
    found = relearned(run)
    assert [each.words for each in found] == ["bent, benign, 16 records", "base, harmful, 16 records"]
    assert found[0].points == ((0, 25), (8, 50))
    axes = FIGURES["relearning"](run).axes[0]
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 8], [0, 8]]
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_a_training_above_the_bound_is_told_in_the_verdict_and_in_its_row(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", training("bent", "harmful", 1.0, 1.584), training("bent", "benign", 0.0, 0.94))
    line = (
        "Whoever trains it (bent, harmful, 16 records) gets 100.0 % of the attacks answered. The perplexity is 1.58 "
        "times as high after it, above the bound of 1.5, so this is not among the attacks below."
    )
    assert uncounted_lines(run) == [line]
    text, _ = checked(write_report(tmp_path / "run"))
    assert line in plain(text)
    assert plain(text).count("above the bound, no attack in the tables") == 1


@pytest.mark.parametrize(
    ("trained", "bound"),
    [
        (training("bent", "harmful", 1.0, 1.5), 1.5),
        (training("bent", "harmful", 0.0, 1.6), 1.5),
        (training("base", "harmful", 1.0, 1.6), 1.5),
        (training("bent", "harmful", 1.0, 1.6), None),
    ],
    ids=["counts as an attack", "got nothing", "of the base", "no bound is known"],
)
def test_nothing_else_is_told(tmp_path: Path, trained: dict[str, Any], bound: float | None) -> None:
    assert uncounted_lines(run_with(tmp_path / "run", trained, bound=bound)) == []


def test_a_ruined_model_that_answers_is_told_too(tmp_path: Path) -> None:
    (line,) = uncounted_lines(run_with(tmp_path / "run", training("bent", "harmful", 1.0, None)))
    assert "The perplexity is lost, above the bound" in line
