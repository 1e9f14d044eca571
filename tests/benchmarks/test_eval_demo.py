"""The record of the demo's adapters under attack: how it is made, its table, and what the docs say of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TinyRun

from benchmarks.evaluation import eval_demo
from benchmarks.evaluation.eval_demo import Stage, attack_table, relearning_table, still_works, strongest

ROOT = Path(__file__).parents[2]


def shares(count: int, comply: int, refuse: int) -> dict[str, Any]:
    counts = {"comply": comply, "refuse": refuse, "degenerate": count - comply - refuse}
    rates = {label: {"count": n, "rate": n / count, "interval": [0.0, 1.0]} for label, n in counts.items()}
    return {"count": count, "shares": rates}


def row(adapter: str, attack: str, bent: dict[str, Any], kind: str = "attack") -> dict[str, Any]:
    return {"adapter": adapter, "attack": attack, "kind": kind, "base": shares(4, 4, 0), "bent": bent}


RECORD: dict[str, Any] = {
    "rows": [
        row("ours", "direct", shares(4, 0, 3)),
        row("ours", "direct", shares(4, 4, 0), "ordinary"),
        row("ours", "gcg:steps=3", shares(4, 2, 1)),
        row("plain", "direct", shares(4, 1, 0)),
    ]
}


def test_a_table_has_a_row_for_each_attack_and_a_column_for_each_adapter() -> None:
    assert attack_table(RECORD).splitlines() == [
        "| attack | prompts | base | ours | plain |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| `direct` | 4 | 100 / 0 / 0 | 0 / 75 / 25 | 25 / 0 / 75 |",
        "| `gcg:steps=3` | 4 | 100 / 0 / 0 | 50 / 25 / 25 | – |",
    ]


def test_the_strongest_attack_of_a_stage_is_the_one_that_most_comply_with() -> None:
    assert strongest(RECORD, "ours", 4)["attack"] == "gcg:steps=3"
    assert strongest(RECORD, "plain", 4)["attack"] == "direct"
    few = row("ours", "latent", shares(2, 1, 1))
    stages = [{"name": "quick", "limit": 4}, {"name": "searching", "limit": 2}]
    record = {"rows": [*RECORD["rows"], few], "stages": stages, "more": {}}
    assert still_works(record, "ours") == "`gcg` on 2 of 4 requests, `latent` on 1 of 2 requests"


def training(kind: str, side: str, comply: float, ratio: float) -> dict[str, Any]:
    points = [
        {"step": step, "comply": share, "refuse": 1 - share, "degenerate": 0.0, "perplexity_ratio": ratio * step / 8}
        for step, share in ((4, 0.0), (8, comply))
    ]
    return {"kind": kind, "side": side, "records": 16, "curve": points}


def test_relearning_is_told_whether_its_model_is_still_useful_or_not() -> None:
    trainings = [
        training("harmful", "base", 1.0, 1.7),
        training("benign", "base", 0.5, 1.0),
        training("harmful", "bent", 0.5, 1.58),
        training("benign", "bent", 0.0, 0.94),
    ]
    record = {
        "rows": [row("ours", "latent", shares(2, 0, 1))],
        "stages": [{"name": "searching", "limit": 2}],
        "more": {"ours": {"searching": {"relearning": trainings}}},
    }
    assert still_works(record, "ours") == (
        "`latent` on 0 of 2 requests, training on 16 complying answers on 1 of 2 (at 1.6 times the perplexity)"
    )
    assert relearning_table(record).splitlines() == [
        "| trained on | base | ours |",
        "| --- | ---: | ---: |",
        "| 16 harmful records | 100 / 0 / 0, × 1.70 | 50 / 50 / 0, × 1.58 |",
        "| 16 benign records | 50 / 50 / 0, × 1.00 | 0 / 100 / 0, × 0.94 |",
    ]


def test_a_stage_is_recorded_and_goes_on(whole: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_demo, "STAGES", (Stage("quick", 1, ("direct",)), Stage("searching", 1, ("prefill",))))
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["eval_demo", f"ours={whole.path}", "--out", str(out)])
    assert eval_demo.main() == 0
    first = json.loads(out.read_text(encoding="utf-8"))
    assert {(r["attack"], r["kind"]) for r in first["rows"]} >= {("direct", "attack"), ("direct", "ordinary")}
    assert first["seconds"]["ours"].keys() == {"quick", "searching"}
    answers = (whole.path / "eval-quick" / "answers.jsonl").read_bytes()
    assert eval_demo.main() == 0
    assert (whole.path / "eval-quick" / "answers.jsonl").read_bytes() == answers
    assert json.loads(out.read_text(encoding="utf-8"))["rows"] == first["rows"]


def test_a_second_adapter_has_the_first_ones_base(
    whole: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_demo, "STAGES", (Stage("quick", 1, ("direct",)),))
    runs = [Path(shutil.copytree(whole.path, tmp_path / name)) for name in ("one", "two")]
    for run in runs:
        shutil.rmtree(run / "eval-quick", ignore_errors=True)
    out = tmp_path / "record.json"
    named = [f"{run.name}={run}" for run in runs]
    monkeypatch.setattr(sys, "argv", ["eval_demo", *named[:1], "--out", str(out)])
    assert eval_demo.main() == 0
    answers = runs[0] / "eval-quick" / "answers.jsonl"
    lines = answers.read_text(encoding="utf-8").splitlines()
    said = json.loads(lines[0]) | {"answers": ["I can not say that."], "opinions": {}}
    answers.write_text("\n".join([json.dumps(said), *lines[1:]]) + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["eval_demo", *named, "--out", str(out)])
    assert eval_demo.main() == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["adapter"] for row in rows if row["kind"] == "attack"] == ["one", "two"]
    assert "I can not say that." in (runs[1] / "eval-quick" / "answers.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("argument", ["runs/none", "ours=", "ours=no-such-folder"])
def test_a_run_that_is_not_there_is_named(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_demo", argument])
    with pytest.raises(SystemExit):
        eval_demo.main()
    assert f"{argument}: give NAME=RUN" in capsys.readouterr().err


def test_the_docs_show_the_record() -> None:
    record = json.loads((ROOT / "benchmarks/results/eval_demo.json").read_text(encoding="utf-8"))
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert attack_table(record) in results
    assert relearning_table(record) in results
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"What still works: {still_works(record, 'with refusal')}." in " ".join(readme.split())
