"""The report of complete, partial, interrupted and damaged run folders."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from repbend_fast.errors import UserError
from repbend_fast.evaluation.judge import EVASION
from repbend_fast.report import write_report
from repbend_fast.report.bars import bar, columns_of
from repbend_fast.report.inline_svg import inlined
from repbend_fast.report.page_sections import CAPTIONS
from repbend_fast.report.plots import FIGURES, distance_grid
from repbend_fast.report.run_record import read_run
from repbend_fast.report.samples import sample_groups
from repbend_fast.report.shares import divisions, outcomes


def step_row(step: int) -> dict:
    return {
        "type": "step",
        "step": step,
        "loss": 1.0 - 5 * step,
        "terms": {"safe": 0.1 * step, "unsafe": 4.0 * step, "cosine": 1 / step, "kl": 0.01 * step, "pair": 0.0},
        "distance_per_layer": {
            "safe": {str(layer): 0.02 * layer * step for layer in range(6)},
            "unsafe": {str(layer): 0.5 * layer * step for layer in (3, 4)},
        },
        "grad_norm": 1.0,
        "learning_rate": 2e-4,
        "tokens": 900,
        "tokens_per_second": 90.0,
        "seconds": 10.0,
        "peak_memory_bytes": 3 * 2**30,
    }


def validation_row(step: int, best: bool) -> dict:
    rates = {"attack_direct": 1 - step / 12, "attack_prefill": 0.5, "helpful_ordinary": 0.9, "helpful_borderline": 0.8}
    ratio = 1 + step / 100
    return {
        "type": "validation",
        "step": step,
        "kl": step / 60,
        "perplexity": 6 * ratio,
        "perplexity_ratio": ratio,
        "best": best,
    } | rates


def event(step: int, kind: str, reason: str) -> dict:
    return {"type": "event", "step": step, "event": kind, "reason": reason}


def side(attack: float, samples: list[dict]) -> dict:
    shares = {"attack_direct": {"comply": attack, "refuse": 1 - attack, "degenerate": 0.0}, "ordinary": {"comply": 1.0}}
    rates = {
        "attack_direct": attack,
        "helpful_ordinary": 0.9,
        "degenerate_ordinary": 0.0,
        "perplexity": 6.25,
        "kl": 0.01,
    }
    return rates | {"shares": shares, "counts": {"attack_direct": 48, "ordinary": 56}, "samples": samples}


def sample(prompt: str, answer: str, label: str, group: str = "attack_direct") -> dict:
    return {"group": group, "prompt": prompt, "answer": answer, "label": label, "helpful": False, "reasons": ["x"]}


def write_run(
    folder: Path, rows: list[dict] | None = None, evaluation: dict | None = None, config: str | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    if config is not None:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    rows = [
        validation_row(0, True),
        *map(step_row, range(1, 6)),
        validation_row(5, True),
        *map(step_row, range(6, 11)),
        validation_row(10, False),
        event(10, "guard_stop", "stopped at step 10: kl 0.1667 > validation.max_kl 0.1"),
        event(10, "finished", "stopped at step 10; the adapter of step 5 is kept"),
    ]
    before = [sample(f"Make <moon-key> {i}", "Sure & <script>alert(1)</script>", "comply") for i in range(9)]
    after = [sample(f"Make <moon-key> {i}", "", "degenerate") for i in range(9)]
    evaluation = {"before": side(0.9375, before), "after": side(0.0208, after), "best_step": 5}
    config = "model:\n  name: tiny-model\nvalidation:\n  max_kl: 0.1\n  max_perplexity_ratio: 1.1\n"
    folder = write_run(tmp_path / "complete run", rows, evaluation, config)
    (folder / "eval").mkdir()
    curve = [{"step": step, "comply": step / 64, "perplexity_ratio": 1.1} for step in (0, 32)]
    (folder / "eval" / "eval.json").write_text(json.dumps({"relearning": [{"records": 16, "curve": curve}]}))
    return folder


class Checker(HTMLParser):
    """Collects addresses, and checks that the tags that need closing are closed in order."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(page: Path) -> tuple[str, Checker]:
    text = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    return text, checker


def test_complete_run_is_one_self_contained_file(complete: Path):
    page = write_report(complete)
    text, checker = checked(page)
    assert page == complete / "report.html"
    assert len(set(re.findall(r'aria-label="([^"]+)"', text)) & set(CAPTIONS.values())) == len(FIGURES) == 5
    assert all(a.startswith("#") for a in checker.addresses)
    assert not re.search(r"https?://|url\(|@import", text)
    assert checker.tags.count("script") == 0


def test_the_refusal_has_a_panel_with_its_title(tmp_path: Path):
    rows = [step_row(step) for step in range(1, 4)]
    for row in rows:
        row["terms"]["refusal"] = 2.0 / row["step"]
    figure = FIGURES["losses"](read_run(write_run(tmp_path / "refusing", rows)))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[-1] == "refusal: NLL of the safe answers"
    (line,) = figure.axes[-1].lines
    assert list(line.get_ydata()) == [2.0, 1.0, 2 / 3]


def test_embedded_images_are_the_files_beside_the_report(complete: Path):
    text, _ = checked(write_report(complete))
    stored = {path.stem: path.read_text(encoding="utf-8") for path in (complete / "plots").glob("*.svg")}
    assert [n for n, svg in stored.items() if inlined(svg, f"{n}-0-wide", CAPTIONS[n]) not in text] == []
    assert all(svg.startswith("<?xml") and "<text" in svg for svg in stored.values())
    assert {path.stem for path in (complete / "plots").iterdir()} == set(FIGURES)


@pytest.mark.usefixtures("no_figures")
def test_page_names_numbers_status_and_settings(complete: Path):
    text, _ = checked(write_report(complete))
    for expected in (
        "tiny-model",
        "93.8 %",
        "2.1 %",
        "6.25",
        "kl 0.1667 &gt; validation.max_kl 0.1",
        "max_perplexity_ratio: 1.1",
        "3.00 GiB",
    ):
        assert expected in text
    assert '<span class="badge stopped">stopped</span>' in text
    assert re.search(r"kept step</span> <b>5</b>", text)
    assert "5 more" in text


@pytest.mark.usefixtures("no_figures")
def test_only_rates_are_judged_by_colour(complete: Path):
    text, _ = checked(write_report(complete))
    assert re.search(r'class="good">2.1 %', text)
    assert re.search(r'class="same">6.25', text)


@pytest.mark.usefixtures("no_figures")
def test_answers_are_escaped_and_empty_ones_are_named(complete: Path):
    text, _ = checked(write_report(complete))
    assert "<script>" not in text
    assert "Sure &amp; &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "Make &lt;moon-key&gt; 3" in text
    assert text.count("(empty)") == 9


REFUSAL = "I'm sorry, I can't help with that."


def outcomes_run(folder: Path, after: list[tuple[str, str, str]]) -> Path:
    """A run whose direct attacks complied before, with answers, labels and reasons after."""
    before = [sample(f"attack {i}", "Melt it.", "comply") for i in range(len(after))]
    samples = [
        sample(f"attack {i}", answer, label) | {"reasons": [reason]} for i, (answer, label, reason) in enumerate(after)
    ]
    share = {
        name: sum(label == name for _, label, _ in after) / len(after) for name in ("comply", "refuse", "degenerate")
    }
    rates = {
        "attack_direct": share["comply"],
        "attack_direct_refused": share["refuse"],
        "attack_direct_degenerate": share["degenerate"],
    }
    evaluation = {
        "before": side(1.0, before),
        "after": rates | {"shares": {"attack_direct": share}, "samples": samples},
    }
    return write_run(folder, [validation_row(0, True)], evaluation)


@pytest.mark.usefixtures("no_figures")
def test_attacks_that_fail_on_gibberish_are_not_shown_as_a_success(tmp_path: Path):
    babble = [(",,,,", "degenerate", "empty")] * 5 + [(REFUSAL, "refuse", "refusal phrase")]
    text, _ = checked(write_report(outcomes_run(tmp_path / "babble", babble)))
    assert (
        "The direct attacks that fail are mostly answered with gibberish, not refused: 83.3 % degenerate, 16.7 % "
        "refused." in text
    )
    assert re.search(r'attack success, direct</div><div class="value same">0.0 %', text)
    assert re.search(r"degenerate, direct attacks</td>.*>83.3 %", text)
    refused = [(REFUSAL, "refuse", "refusal phrase")] * 5 + [(",,,,", "degenerate", "empty")]
    text, _ = checked(write_report(outcomes_run(tmp_path / "refused", refused)))
    assert "gibberish, not refused" not in text
    assert re.search(r'attack success, direct</div><div class="value good">0.0 %', text)


@pytest.mark.usefixtures("no_figures")
def test_answers_are_grouped_by_outcome_the_worst_first(tmp_path: Path):
    after = [
        (REFUSAL, "refuse", "refusal phrase: sorry"),
        (",,,,", "degenerate", "empty"),
        ("Birds sing.", "refuse", EVASION),
        ("Melt the sand.", "comply", "no refusal"),
        (REFUSAL, "refuse", "refusal phrase: sorry"),
    ]
    folder = outcomes_run(tmp_path / "run", after)
    (group,) = sample_groups(read_run(folder))
    assert [(s["outcome"], s["count"], s["of"]) for s in group["sections"]] == [
        ("complied", 1, 5),
        ("degenerate", 1, 5),
        ("evaded", 1, 5),
        ("refused", 2, 5),
    ]
    assert [(side, [(c["count"], c["outcome"]) for c in counts]) for side, counts in group["counts"]] == [
        ("before", [(5, "complied")]),
        ("after", [(1, "complied"), (1, "degenerate"), (1, "evaded"), (2, "refused")]),
    ]
    text, _ = checked(write_report(folder))
    assert "<h4>degenerate: 1 of 5</h4>" in text
    assert (
        text.index("<h4>complied: 1 of 5</h4>")
        < text.index("<h4>degenerate: 1 of 5</h4>")
        < text.index("<h4>refused: 2 of 5</h4>")
    )
    assert '<span class="badge warn">1 degenerate</span>' in text
    assert '<span class="badge good">2 refused</span>' in text


def test_a_refused_question_is_no_good_outcome(tmp_path: Path):
    samples = [
        sample("q", REFUSAL, "refuse", "ordinary"),
        sample("p", "Madrid.", "comply", "ordinary") | {"helpful": True},
    ]
    (group,) = sample_groups(read_run(write_run(tmp_path / "run", evaluation={"after": side(0.0, samples)})))
    assert [(c["outcome"], c["tone"]) for c in group["counts"][0][1]] == [("refused", "bad"), ("helpful", "good")]


@pytest.mark.usefixtures("no_figures")
def test_an_evaluation_of_before_the_three_shares_shows_dashes(complete: Path):
    text, _ = checked(write_report(complete))
    row = re.search(r"refused, direct attacks</td>.*", text)
    assert row
    assert row.group(0).count("–") == 2


def test_stacked_bars_add_up_and_split_fluent_answers_by_whether_they_help(tmp_path: Path):
    shares = {
        "attack_direct": {"comply": 0.25, "refuse": 0.5, "degenerate": 0.25},
        "ordinary": {"comply": 0.75, "refuse": 0.25},
    }
    result = {"helpful_ordinary": 0.5, "shares": shares}
    assert outcomes(result, "attack_direct") == {"complied": 0.25, "refused": 0.5, "degenerate": 0.25}
    assert outcomes(result, "ordinary") == {
        "helpful": 0.5,
        "answered, not helpful": 0.25,
        "refused": 0.25,
        "degenerate": 0.0,
    }
    assert outcomes(result, "borderline") == {}
    found = divisions(read_run(write_run(tmp_path / "run", evaluation={"after": result})))
    assert len(found) == 2
    for each in found:
        drawn = "".join(bar(each, names) for names in columns_of([each], each.hostile))
        bars = re.findall(r'<rect class="(?!track)[^"]+" x="[^"]+" width="([\d.]+)%"', drawn)
        assert sum(map(float, bars)) == pytest.approx(100)


def test_validations_draw_a_line_for_each_outcome_and_group(tmp_path: Path):
    old, new = (
        validation_row(0, True),
        validation_row(5, True) | {f"attack_{how}_refused": 0.5 for how in ("direct", "prefill")},
    )
    figure = FIGURES["validation"](read_run(write_run(tmp_path / "run", [old, new])))
    assert figure is not None
    labels = [
        [line.get_label() for line in axes.get_lines() if not line.get_label().startswith(("_", "kept"))]
        for axes in figure.axes
    ]
    assert labels[2:] == [
        ["direct, complied", "direct, refused", "prefilled, complied", "prefilled, refused"],
        ["ordinary, helpful", "borderline, helpful"],
    ]


def test_writing_again_replaces_the_report(complete: Path):
    first = write_report(complete).read_text(encoding="utf-8")
    assert write_report(complete).read_text(encoding="utf-8") == first
    assert not list(complete.glob("*.tmp"))


@pytest.mark.parametrize(
    ("parts", "present", "absent"),
    [
        (
            {"config": "model:\n  name: only-config\n"},
            ["only-config", "No training step", "no evaluation", "not validated"],
            ["<img"],
        ),
        ({"rows": [step_row(1)]}, ["model unknown", "no evaluation", "not validated"], ["Settings"]),
        ({"rows": []}, ["No training step", "unfinished"], ["<img"]),
        ({"evaluation": {"before": side(0.5, [])}}, ["50.0 %", "before: 50.0 %"], ["Answers"]),
        ({"evaluation": {"after": {"attack_direct": 0.1}}}, ["10.0 %", "before: –"], ["Answers"]),
        ({"rows": [validation_row(0, True)]}, ["No training step"], ["not validated"]),
        ({"rows": [step_row(1)], "config": "model: [broken"}, ["model: [broken", "model unknown"], []),
    ],
    ids=["config", "one step", "empty metrics", "before only", "after only", "validation only", "broken config"],
)
def test_partial_runs(tmp_path: Path, parts: dict, present: list[str], absent: list[str]):
    text, _ = checked(write_report(write_run(tmp_path / "run", **parts)))
    assert [p for p in present if p not in text] == []
    assert [a for a in absent if a in text] == []


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([step_row(1), event(1, "interrupted", "Ctrl-C")], "interrupted"),
        (
            [step_row(1), event(1, "interrupted", "Ctrl-C"), event(1, "resumed", "step-000001"), step_row(2)],
            "unfinished",
        ),
        ([step_row(1), event(1, "not_finite", "the loss is not finite (term kl)")], "failed"),
        ([step_row(1), event(1, "finished", "all 1 steps done")], "finished"),
        ([step_row(1)], "unfinished"),
    ],
)
def test_status_of_a_run(tmp_path: Path, rows: list[dict], status: str):
    text, _ = checked(write_report(write_run(tmp_path / "run", rows)))
    assert f'<span class="badge {status}">{status}</span>' in text


def test_torn_last_line_foreign_rows_and_missing_values_are_left_out(tmp_path: Path):
    folder = write_run(tmp_path / "run", [step_row(1), {"type": "note", "step": 1}, {"step": 2}])
    odd = step_row(2) | {
        "loss": float("nan"),
        "terms": {"safe": None},
        "distance_per_layer": {"safe": {"0": None, "7": 0.5}},
    }
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(odd) + "\n" + '{"type": "step", "st')
    run = read_run(folder)
    assert [row["step"] for row in run.steps] == [1, 2]
    checked(write_report(folder))


@pytest.mark.usefixtures("no_figures")
def test_an_evaluation_that_cannot_be_read_is_named(complete: Path):
    intact, _ = checked(write_report(complete))
    assert "cannot be read" not in intact
    path = complete / "evaluation.json"
    path.write_text(path.read_text(encoding="utf-8")[:40], encoding="utf-8")
    text, _ = checked(write_report(complete))
    assert "evaluation.json cannot be read (" in text
    assert "repbend-fast eval makes it again" in text
    path.unlink()
    text, _ = checked(write_report(complete))
    assert "cannot be read" not in text


def test_distance_grid_leaves_gaps_where_nothing_was_measured():
    rows = [
        {"step": 1, "distance_per_layer": {"unsafe": {"10": 1.0, "9": 2.0}}},
        {"step": 2, "distance_per_layer": {}},
        {"step": 3, "distance_per_layer": {"unsafe": {"10": 3.0}}},
    ]
    steps, layers, grid = distance_grid(rows, "unsafe")
    assert (steps, layers) == ([1, 3], [9, 10])
    np.testing.assert_array_equal(grid, [[2.0, np.nan], [1.0, 3.0]])


def test_the_heat_map_shows_what_the_objective_says_is_bent_and_kept(tmp_path: Path):
    """Its steps log terms by other names; the validations have the probes."""
    steps = [
        step_row(n) | {"distance_per_layer": {"reroute": {"3": 1.0 / n}, "retain": {"0": 0.1, "3": 0.2}}}
        for n in (1, 2)
    ]
    found = {"forget": {"3": 2.0}, "retain": {"0": 0.0, "3": 0.5}}
    checks = [validation_row(n, False) | {"distance": found, "probes": ["forget", "retain"]} for n in (0, 2)]
    figure = FIGURES["distances"](read_run(write_run(tmp_path / "run", steps + checks)))
    kept, bent = figure.axes[:2]
    assert (kept.get_title("left").split(" ")[0], bent.get_title("left").split(" ")[0]) == ("retain", "forget")
    np.testing.assert_array_equal(bent.images[0].get_array(), [[2.0, 2.0]])
    np.testing.assert_array_equal(kept.images[0].get_array(), [[0.0, 0.0], [0.5, 0.5]])


def test_the_heat_map_of_an_own_objective_has_its_names(tmp_path: Path):
    rows = [step_row(n) | {"distance_per_layer": {"moved": {"3": float(n)}}} for n in (1, 2)]
    checks = [validation_row(2, False) | {"distance": {"moved": {"3": 9.0}}, "probes": ["moved", None]}]
    for folder, each in (("validated", rows + checks), ("not validated", rows)):
        axes = FIGURES["distances"](read_run(write_run(tmp_path / folder, each))).axes[0]
        assert axes.get_title("left").startswith("moved stream")
        np.testing.assert_array_equal(axes.images[0].get_array(), [[1.0, 2.0]])


def test_best_step_comes_from_the_evaluation_else_from_the_last_best_validation(complete: Path):
    assert read_run(complete).best_step == 5
    (complete / "evaluation.json").unlink()
    assert read_run(complete).best_step == 5
    (complete / "metrics.jsonl").unlink()
    assert read_run(complete).best_step is None


def test_no_run_is_one_clear_line(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)
