"""The check of zero distance at the sizes that are trained, on a tiny model; on a GPU with its kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.step import zero_distance
from benchmarks.step.step_cases import fill_adapter
from benchmarks.step.zero_distance import failures, main


def test_all_distances_are_zero_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "zero.json"
    assert main(["--tiny", "--results", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["versions"]["torch"]
    assert {(row["case"].split("-")[1], row["setting"]) for row in record["rows"]} == {
        (weights, setting)
        for weights in ("nf4", "bfloat16")
        for setting in ("one piece", "streams merged", "recomputed, split")
    }
    split = next(row for row in record["rows"] if row["setting"] == "recomputed, split")
    assert split["levers"]["checkpoint_blocks"] > 0
    assert split["levers"]["piece_tokens"]
    for row in record["rows"]:
        assert set(row["terms"]) >= {"safe", "unsafe"}
        assert all(found["layers"] > 1 and found["largest"] == 0.0 for found in row["terms"].values())
    assert "missed" not in capsys.readouterr().out


def test_a_distance_that_is_not_zero_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attach = zero_distance.attach_lora

    def trained(*arguments):
        model = attach(*arguments)
        fill_adapter(model)
        return model

    monkeypatch.setattr(zero_distance, "attach_lora", trained)
    path = tmp_path / "zero.json"
    assert main(["--tiny", "--weights", "bfloat16", "--results", str(path)]) == 1
    assert "missed: tiny-bfloat16-b2-real, one piece: safe is not 0 in" in capsys.readouterr().out
    row = json.loads(path.read_text())["rows"][0]
    assert row["terms"]["unsafe"]["nonzero"] > 0
    # A run that compared nothing has shown nothing.
    assert failures(row | {"terms": {}})


@pytest.mark.gpu
def test_all_distances_are_zero_on_a_gpu(tmp_path: Path) -> None:
    assert main(["--tiny", "--results", str(tmp_path / "zero.json")]) == 0


def test_without_a_gpu_the_large_shape_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "--tiny" in capsys.readouterr().err
