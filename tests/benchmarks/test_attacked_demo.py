"""The records of the demo under attack and rounded: what is trained, whose answers of the base are taken, what stands
together.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.demo import attacked_demo, rounded_demo
from repbend_fast.assessment.answers import RowFile

ROWS = [
    ("base", "direct", ["comply"]),
    ("base", "embedding-strong", ["comply", "comply", "degenerate"]),
    ("bent", "embedding-strong", ["refuse", "refuse", "refuse"]),
    ("bent", "embedding-strong", ["comply", "refuse", "refuse"]),
]
"""Side, attack and labels of the answers that a run in place of an evaluation got."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What was trained and attacked, in place of doing it."""
    seen: list[tuple[object, ...]] = []

    def run_seed(seed: int, folder: Path, overrides: list[str], recipe: str = "demo") -> dict[str, object]:
        seen.append(("train", recipe, seed, overrides))
        return {"seed": seed}

    def assess(folder: Path, **settings: Any) -> SimpleNamespace:
        seen.append(("attack", folder.name, settings["base_of"], settings["limit"]))
        settings["out"].mkdir(parents=True, exist_ok=True)
        shared = {"suite": "s", "index": 0, "kind": "attack", "answers": []}
        for side, attack, labels in ROWS:
            opinions = {"rule": [{"label": label} for label in labels], "other": []}
            RowFile(settings["out"] / "answers.jsonl").append(
                {**shared, "side": side, "attack": attack, "opinions": opinions}
            )
        rounding = ["what is left"] if "rounding:formats=nf4" in settings["attacks"] else []
        return SimpleNamespace(summary={"groups": [{"asked": folder.name}], "rounding": rounding})

    for module in (attacked_demo, rounded_demo):
        monkeypatch.setattr(module, "run_seed", run_seed)
    monkeypatch.setattr(attacked_demo, "assess", assess)
    return seen


def test_the_base_is_asked_once(calls: list[tuple[object, ...]], tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    attacked_demo.main(["--seeds", "3", "4", "--limit", "5", "--folder", str(tmp_path), "--out", str(out), "a=1"])
    first = tmp_path / "seed-3" / "eval-attacked"
    assert calls == [
        ("train", "demo-adversarial", 3, ["a=1"]),
        ("attack", "seed-3", None, 5),
        ("train", "demo-adversarial", 4, ["a=1"]),
        ("attack", "seed-4", first, 5),
    ]
    runs = json.loads(out.read_text())["runs"]
    assert [(run["seed"], run["groups"]) for run in runs] == [(n, [{"asked": f"seed-{n}"}]) for n in (3, 4)]
    assert runs[0]["answers"] == [
        {"side": "base", "attack": "embedding-strong", "comply": 2, "degenerate": 1},
        {"side": "bent", "attack": "embedding-strong", "refuse": 5, "comply": 1},
    ]


def test_runs_of_other_settings_stay_in_the_record(calls: list[tuple[object, ...]], tmp_path: Path) -> None:
    given = ["--folder", str(tmp_path), "--out", str(tmp_path / "record.json")]
    for more in (["a=1"], ["--recipe", "demo"], ["a=1"]):
        attacked_demo.main([*given, *more])
    runs = json.loads((tmp_path / "record.json").read_text())["runs"]
    assert [run["settings"]["recipe"] for run in runs] == ["demo", "demo-adversarial"]
    assert [call[1:] for call in calls if call[0] == "train"] == [
        ("demo-adversarial", 42, ["a=1"]),
        ("demo", 42, []),
        ("demo-adversarial", 42, ["a=1"]),
    ]


def test_rounded_without_the_option_and_with_it(calls: list[tuple[object, ...]], tmp_path: Path) -> None:
    out = tmp_path / "folder" / "record.json"
    rounded_demo.main(["--seeds", "3", "--every", "2", "--folder", str(tmp_path), "--out", str(out), "a=1"])
    assert calls == [
        ("train", "demo", 3, ["a=1"]),
        ("attack", "seed-3-never", None, None),
        ("train", "demo", 3, ["a=1", "training.nf4_every=2"]),
        ("attack", "seed-3-2", tmp_path / "seed-3-never" / "eval-attacked", None),
    ]
    record = json.loads(out.read_text())
    assert [(run["nf4_every"], run["rounding"]) for run in record["runs"]] == [
        (None, ["what is left"]),
        (2, ["what is left"]),
    ]
    assert record["suite"] == "demo-hearing"
    assert record["overrides"] == ["a=1"]


def test_the_results_show_the_record_under_attack() -> None:
    root = Path(__file__).parents[2]
    runs = json.loads((root / "benchmarks/results/demo_attacked.json").read_text(encoding="utf-8"))["runs"]
    runs = [run for run in runs if run["settings"]["recipe"] == "demo-adversarial"]
    assert [run["seed"] for run in runs] == [42, 1, 2]
    by_prompt, by_answer = [], []
    for side, run in (("base", runs[0]), *(("bent", run) for run in runs)):
        (group,) = (g for g in run["groups"] if g["side"] == side and g["attack"].startswith("embedding-strong"))
        by_prompt.append(f"{group['judges']['rule']['comply']['count']} of {group['count']}")
        (labels,) = (found for found in run["answers"] if found["side"] == side)
        by_answer.append(" / ".join(str(labels.get(label, 0)) for label in ("comply", "refuse", "degenerate")))
    section = (root / "docs/results.md").read_text(encoding="utf-8").partition("### Latent adversarial training")[2]
    assert f"any answer that complies | {' | '.join(by_prompt)} |" in section
    assert f"its 80 answers | {' | '.join(by_answer)} |" in section
    kept = [sides["after"] for sides in runs]
    for title, keys in (
        ("direct attacks, %, 64", ("attack_direct", "attack_direct_refused", "attack_direct_degenerate")),
        ("forced attacks, %, 64", ("attack_prefill", "attack_prefill_refused", "attack_prefill_degenerate")),
    ):
        cells = [" / ".join(f"{100 * side[key]:.0f}" for key in keys) for side in (runs[0]["before"], *kept)]
        assert f"| {title} | {' | '.join(cells)} |" in section
    for title, key in (("ordinary questions, %, 78", "helpful_ordinary"), ("look-alikes, %, 68", "helpful_borderline")):
        cells = [f"({100 * side[key]:.0f})" for side in (runs[0]["before"], *kept)]
        assert f"| {title} | {' | '.join(cells)} |" in section
