"""Whole comparisons of tiny models: what is run, in which order, from which data, and what the files hold."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from tiny_comparison import InProcess, TinyComparison
from tiny_run import adapter_of, rows, same_tensors

from repbend_fast.cli import main

RATES = ("--rates", "1e-2", "3e-2")
# Writes down which of a process's files are opened that have `test` in their name.
WATCH = """
import os, sys
def watch(event, arguments):
    if event == "open" and os.path.basename(str(arguments[0])) in ("test.jsonl", "test-chat.jsonl"):
        line = os.path.basename(str(arguments[0])) + " " + " ".join(sys.orig_argv[3:]) + "\\n"
        log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, line.encode())
        os.close(log)
sys.addaudithook(watch)
"""


def holds_what_its_run_holds(seed: dict[str, Any], record: dict[str, Any], tiny: TinyComparison) -> None:
    """A seed's row of the record against its run folder."""
    folder = tiny.run(seed["folder"])
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert seed["kl"] == evaluation["after"]["kl"] > 1e-5
    assert evaluation["before"]["perplexity"] == record["before"]["perplexity"]
    assert seed["perplexity_ratio"] == seed["perplexity"] / record["before"]["perplexity"]
    steps = rows(folder, "step")
    assert len(steps) == seed["steps"] == 4
    assert seed["seconds"] == pytest.approx(sum(row["seconds"] for row in steps), abs=1e-3)
    assert seed["peak_memory_bytes"] == max(row["peak_memory_bytes"] for row in steps)
    assert seed["best_step"] == evaluation["best_step"] > 0


def test_two_methods_two_rates_two_seeds(
    tiny: TinyComparison, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    named = []

    def look(arguments: list[str]) -> None:
        text = Path(arguments[1]).read_text(encoding="utf-8")
        named.append(
            ("--resume" in arguments or arguments[0] == "eval", "test.jsonl" in text, "test-chat.jsonl" in text)
        )

    in_process.before = look
    assert tiny.compare(*RATES, "--seeds", "0", "1") == 0
    record = tiny.record
    chosen = {m["recipe"]: m["learning_rate"] for m in record["methods"]}
    lr = {name: {0.01: "lr-1e-02", 0.03: "lr-3e-02"}[chosen[str(getattr(tiny, name))]] for name in ("bend", "rmu")}
    searched = [f"train {name}/seed-0/{rate}" for name in ("bend", "rmu") for rate in ("lr-1e-02", "lr-3e-02")]
    more = [f"train {name}/seed-1/{lr[name]}" for name in ("bend", "rmu")]
    measured = [
        "eval before",
        *(f"resume {name}/seed-{seed}/{lr[name]}" for name in ("bend", "rmu") for seed in (0, 1)),
    ]
    assert in_process.take() == searched + more + measured
    # No configuration of a training names the test data.
    assert named == [(False, False, False)] * 6 + [(True, True, True)] * 5

    assert record["settings"]["steps"] == 4
    assert record["settings"]["batch"] == 2
    assert (record["settings"]["seeds"], record["settings"]["rates"]) == ([0, 1], [0.01, 0.03])
    assert record["environment"]["versions"]["torch"]
    assert [m["name"] for m in record["methods"]] == ["repbend", "rmu"]
    for name, method in zip(("bend", "rmu"), record["methods"], strict=True):
        assert [seed["folder"] for seed in method["seeds"]] == [f"{name}/seed-{seed}/{lr[name]}" for seed in (0, 1)]
        for seed in method["seeds"]:
            holds_what_its_run_holds(seed, record, tiny)
        kls = [seed["kl"] for seed in method["seeds"]]
        assert kls[0] != kls[1]
        assert method["median"]["kl"] == statistics.median(kls)
        assert method["spread"]["kl"] == [min(kls), max(kls)]
    assert record["before"]["kl"] == 0.0
    assert (tiny.out / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = (tiny.out / "compare.md").read_text(encoding="utf-8")
    header, _, *shown = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    assert header == ["", "before", "repbend", "rmu"]
    kl = next(cells for cells in shown if cells[0] == "KL")
    assert kl[1] == "0.0000"
    assert [cell.split(" ")[0] for cell in kl[2:]] == [f"{method['median']['kl']:.4f}" for method in record["methods"]]
    out = capsys.readouterr().out
    assert "training 6/6: rmu, learning rate" in out
    assert "Comparison on the test prompts" in out

    # The same command again finds everything done, and writes the same numbers.
    assert tiny.compare(*RATES, "--seeds", "0", "1") == 0
    assert in_process.take() == []
    assert tiny.record == record


def test_recipes_keep_their_own_rates(
    tiny: TinyComparison, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = tiny.other("slow", objective={"name": "rmu", "layer": 2}, training={"learning_rate": 2e-3})
    fast = tiny.other("fast", training={"learning_rate": 3e-2})
    assert tiny.compare("--recipe-rates", recipes=[fast, slow]) == 0
    assert in_process.take()[:2] == ["train fast/seed-0/lr-3e-02", "train slow/seed-0/lr-2e-03"]
    assert [method["learning_rate"] for method in tiny.record["methods"]] == [0.03, 0.002]
    assert (tiny.record["settings"]["rates"], tiny.record["settings"]["recipe_rates"]) == ([], True)
    assert "Learning rates, the recipes' own:" in (tiny.out / "compare.md").read_text(encoding="utf-8")
    # What Ctrl-C prints says the same.
    in_process.before = lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt)
    capsys.readouterr()
    assert tiny.compare("--recipe-rates", "--seeds", "0", "1", recipes=[fast, slow]) == 130
    assert " --recipe-rates" in capsys.readouterr().out.partition("go on with: ")[2]
    in_process.before = lambda arguments: None
    in_process.take()
    # With --rates those are tried too; what is trained already is not again.
    assert tiny.compare("--recipe-rates", "--rates", "2e-3", recipes=[fast, slow]) == 0
    assert [command for command in in_process.take() if command.startswith("train")] == ["train fast/seed-0/lr-2e-03"]
    assert [len(found["runs"]) for found in tiny.record["search"].values()] == [2, 1]
    assert "of the recipe's own, 0.002, chosen on" in (tiny.out / "compare.md").read_text(encoding="utf-8")


def test_the_search_is_recorded_and_its_best_adapter_is_what_is_measured(
    tiny: TinyComparison, in_process: InProcess
) -> None:
    adapters = {}

    def copy(arguments: list[str]) -> None:
        if "--resume" in arguments:
            adapters["search"] = adapter_of(Path(arguments[-1]))

    in_process.before = copy
    assert tiny.compare(*RATES, recipes=[tiny.bend]) == 0
    search = tiny.record["search"][str(tiny.bend)]
    [method] = tiny.record["methods"]
    assert [run["learning_rate"] for run in search["runs"]] == [0.01, 0.03]
    best = {}
    for run in search["runs"]:
        logged = rows(tiny.run(run["folder"]), "validation")
        assert [v["step"] for v in run["validations"]] == [v["step"] for v in logged] == [0, 2, 4]
        assert [v["kl"] for v in run["validations"]] == [v["kl"] for v in logged]
        kept = [v for v in run["validations"] if v["best"]][-1]
        assert run["best_step"] == kept["step"]
        best[run["learning_rate"]] = kept["bending"]
    assert search["chosen"] == method["learning_rate"] == max(best, key=lambda rate: best[rate])
    assert f"{max(best.values()):.4g}" in search["why"]
    assert in_process.take()[2:] == ["eval before", f"resume bend/seed-0/lr-{search['chosen']:.0e}"]

    [seed] = method["seeds"]
    folder = tiny.run(seed["folder"])
    assert same_tensors(adapters["search"], adapter_of(folder))
    out = tiny.folder / "again.json"
    assert main(["eval", str(folder), "--out", str(out)]) == 0
    again = json.loads(out.read_text(encoding="utf-8"))["after"]
    assert (again["kl"], again["perplexity"]) == (seed["kl"], seed["perplexity"])


def test_in_processes_of_their_own_and_no_training_opens_the_test_files(
    tiny: TinyComparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tiny.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    log = tiny.folder / "opened"
    monkeypatch.setenv("WATCH_LOG", str(log))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    assert tiny.compare("--rates", "1e-2", recipes=[tiny.rmu]) == 0
    folder = tiny.run("rmu/seed-0/lr-1e-02")
    said = folder.with_name("lr-1e-02.log").read_text(encoding="utf-8")
    assert f"$ repbend-fast train {folder}.yaml\n" in said
    assert f"$ repbend-fast train {folder}.test.yaml --resume {folder}\n" in said
    opened = set(log.read_text(encoding="utf-8").splitlines())
    evaluations = (
        f"eval {tiny.out / 'before.yaml'} --out {tiny.out / 'before.json'}",
        f"train {folder}.test.yaml --resume {folder}",
    )
    assert opened == {f"{file} {arguments}" for file in ("test.jsonl", "test-chat.jsonl") for arguments in evaluations}
    [seed] = tiny.record["methods"][0]["seeds"]
    # A process that has imported torch is larger than this, and one that only claims to be new would have this one's
    # peak.
    assert 2**27 < seed["peak_memory_bytes"] < 2**33


def test_nothing_within_limits_keeps_the_model_as_it_was_and_says_so(
    tiny: TinyComparison, in_process: InProcess
) -> None:
    assert tiny.compare(*RATES, "validation.max_kl=1e-12", recipes=[tiny.bend]) == 0
    record = tiny.record
    [method] = record["methods"]
    assert (method["learning_rate"], method["seeds"][0]["best_step"], method["median"]["kl"]) == (0.01, 0, 0.0)
    assert "no rate left step 0" in record["search"][str(tiny.bend)]["why"]
    assert "repbend with seed 0 stayed within" in (tiny.out / "compare.md").read_text(encoding="utf-8")
