"""The report of what ``repbend-fast eval`` leaves: bars, intervals, verdict, several judges and several runs."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from eval_folders import SHARES, answer, summary, write_eval
from test_report import checked, event, sample, side, step_row, write_run

from repbend_fast.evaluation.statistics import wilson
from repbend_fast.report import page_sections, pictures, write_report
from repbend_fast.report.bars import bar, columns_of
from repbend_fast.report.plots import FIGURES, costs, spread
from repbend_fast.report.run_record import read_run
from repbend_fast.report.samples import MOST_SAMPLES, sample_groups
from repbend_fast.report.shares import EVALUATION, divisions, interval_of
from repbend_fast.report.verdict import verdict


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "bent run", [step_row(1), event(1, "finished", "done")])
    write_eval(folder / "eval")
    return folder


def plain(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html))


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(0, 48, 0.0, 0.0741), (48, 48, 0.9259, 1.0), (1, 48, 0.0037, 0.1090), (24, 48, 0.3639, 0.6361)],
)
def test_wilson_intervals(count: int, total: int, low: float, high: float):
    assert wilson(count, total) == pytest.approx((low, high), abs=1e-4)
    assert interval_of(0, 0) is None


def test_every_share_of_every_side_attack_and_judge_is_there(run: Path):
    found = {(d.attack, d.kind, d.judge, d.side): d for d in divisions(read_run(run))}
    assert len(found) == 2 * 2 * len(SHARES)
    direct = found["direct", "attack", "rule", "bent"]
    assert {name: share.rate for name, share in direct.shares.items()} == {
        "complied": 0.05,
        "refused": 0.85,
        "degenerate": 0.05,
        "unparsed": 0.05,
    }
    assert direct.shares["refused"].interval == wilson(17, 20)
    helpful = found["direct", "ordinary", "rule", "bent"]
    assert {name: share.rate for name, share in helpful.shares.items()} == pytest.approx(
        {"helpful": 0.8, "answered, not helpful": 0.1, "refused": 0.05, "degenerate": 0.05, "unparsed": 0.0}
    )
    assert "answered" in found["direct", "ordinary", "endpoint:tiny", "bent"].shares


def test_a_stored_interval_is_kept_and_one_that_is_none_replaced(tmp_path: Path):
    content = summary()
    labels = content["groups"][0]["judges"]["rule"]
    labels["comply"]["interval"] = [0.5, 0.99]
    labels["refuse"]["interval"] = ["low", None]
    write_eval(write_run(tmp_path / "run", [step_row(1)]) / "eval", content)
    first = divisions(read_run(tmp_path / "run"))[0]
    assert first.shares["complied"].interval == (0.5, 0.99)
    assert first.shares["refused"].interval == wilson(2, 20)


def test_whiskers_reach_from_end_to_end_of_the_interval(run: Path):
    bent = next(d for d in divisions(read_run(run)) if (d.attack, d.side) == ("gcg", "bent"))
    drawn = bar(bent, ("complied",))
    low, high = wilson(8, 20) or (0, 0)
    assert f'x1="{100 * low:.3f}%" x2="{100 * high:.3f}%"' in drawn
    assert '<rect class="complied" x="0.000%" width="40.000%"' in drawn
    assert 'aria-label="complied 40.0 % (21.9–61.3)"' in drawn
    assert columns_of([bent], hostile=True) == [("complied",), ("refused",), ("degenerate", "unparsed")]


def test_the_page_shows_three_shares_with_intervals_for_each_attack_and_side(run: Path, no_figures: None):
    text, checker = checked(write_report(run))
    blocks = re.findall(r'<th scope="rowgroup".*?</tbody>', text, re.DOTALL)
    (words,) = [plain(block) for block in blocks if "only base complies" in block]
    for expected in ("40.0 % (21.9–61.3)", "50.0 % (29.9–70.1)", "10.0 % (2.8–30.1)", "only base complies 11"):
        assert expected in words
    assert "+ 5.0 % unparsed" in plain(text)
    assert "judged by endpoint:tiny" in plain(text)
    assert "0.81" in plain(text)
    assert checker.tags.count("script") == 0


def test_the_verdict_names_the_strongest_attack_by_both_judges_and_what_it_costs(run: Path):
    assert plain(verdict(read_run(run))) == (
        "The strongest of 2 attacks, gcg, succeeds on 45.0 % by endpoint:tiny (before 100.0 %) and 40.0 % by rule "
        "(before 95.0 %) of 20 requests; of ordinary questions 80.0 % (before 90.0 %) are answered helpfully, of "
        "harmless borderline questions 25.0 % (before 5.0 %) are refused, perplexity is 1.25 times that of the base."
    )


def test_the_verdict_of_a_run_that_was_evaluated_while_training(tmp_path: Path):
    evaluation = {"before": side(0.9375, []), "after": side(0.0208, [])}
    found = plain(verdict(read_run(write_run(tmp_path / "a", evaluation=evaluation))))
    assert found.startswith("The one attack, direct, succeeds on 2.1 % (before 93.8 %) of 48 requests; ")
    assert "of ordinary questions 90.0 % (before 90.0 %) are answered helpfully" in found
    before = plain(verdict(read_run(write_run(tmp_path / "b", evaluation={"before": side(0.5, [])}))))
    assert before.startswith("The one attack, direct, succeeds before bending on 50.0 % of 48 requests; ")
    nothing = plain(verdict(read_run(write_run(tmp_path / "c", [step_row(1)]))))
    assert nothing == "No attack was measured; what it costs in usefulness was not measured."


def test_missing_parts_are_one_line_each_and_leave_no_frame(tmp_path: Path):
    text, checker = checked(write_report(write_run(tmp_path / "run", [])))
    notes = re.findall(r'<p class="muted">([^<]+)</p>', text)
    assert len(notes) == 8
    assert "figure" not in checker.tags
    assert "table" not in checker.tags


def test_questions_and_attacks_make_the_points_of_the_tradeoff(run: Path):
    points = {attack: (new, old) for (attack, new), old in costs(read_run(run)).values()}
    assert set(points) == {"direct", "gcg"}
    new, old = points["gcg"]
    assert new == pytest.approx((80, 45))  # the judge counts that finds more
    assert old == pytest.approx((90, 100))
    figure = FIGURES["tradeoff"](read_run(run))
    assert {text.get_text() for text in figure.axes[0].texts} == {"direct", "gcg"}


@pytest.mark.parametrize("values", [[0, 0, 0], [0, 1, 99, 100], [98, 99, 100], [50]])
def test_labels_are_spread_and_stay_inside(values: list[float]):
    heights = spread(values, 6.5, 0, 100)
    assert all(b - a >= 6.5 - 1e-9 for a, b in pairwise(heights))
    assert min(heights) >= 0
    assert max(heights) <= 100


def test_relearning_draws_a_line_for_each_attacker(run: Path):
    (line,) = FIGURES["relearning"](read_run(run)).axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([0, 40, 80])
    assert line.get_label() == "64 records, rate 0.001, rank 8"


def test_an_answer_decides_over_those_beside_it(tmp_path: Path, no_figures: None):
    judged = [{"label": label, "reason": label} for label in ("refuse", "comply", "refuse")]
    row = answer("bent", 0, "", "refuse", answers=["No.", "Take glass.", "Never."], opinions={"rule": judged})
    unsure = [{"label": "refuse"}, {"label": "unparsed"}]
    other = answer("bent", 1, "", "", answers=["No.", "Hm."], opinions={"rule": unsure}, prefills=["Sure", "Well"])
    folder = write_run(tmp_path / "run", [step_row(1)])
    write_eval(folder / "eval", rows=[row, other])
    (group,) = sample_groups(read_run(folder))
    shown = {s["outcome"]: dict(s["open"][0]["sides"])["bent"] for s in group["sections"]}
    assert (shown["complied"]["answer"], shown["complied"]["more"]) == ("Take glass.", ["No.", "Never."])
    assert (shown["unparsed"]["answer"], shown["unparsed"]["prefill"]) == ("Hm.", "Well")
    text, _ = checked(write_report(folder))
    assert "2 other answers" in text


def test_base_and_bent_stand_beside_each_other_with_their_outcomes(run: Path, no_figures: None):
    text, _ = checked(write_report(run))
    (group,) = sample_groups(read_run(run))
    assert group["counts"] == [
        ("base", [{"outcome": "complied", "count": 6, "tone": "bad"}]),
        (
            "bent",
            [
                {"outcome": "complied", "count": 1, "tone": "bad"},
                {"outcome": "refused", "count": 5, "tone": "good"},
            ],
        ),
    ]
    assert text.count('data-outcomes=\'["complied", "refused"]\'') == 5
    card = text[text.index("data-outcomes") : text.index("</article>")]
    assert card.index("First find willow number 0.") < card.index("Take glass.")


def test_answers_beyond_what_a_page_holds_are_counted(tmp_path: Path, no_figures: None):
    folder = write_run(tmp_path / "run", [step_row(1)])
    write_eval(folder / "eval", rows=[answer("bent", i, "No.", "refuse") for i in range(MOST_SAMPLES + 7)])
    text, checker = checked(write_report(folder))
    assert checker.tags.count("article") == MOST_SAMPLES
    assert "7 are left out here" in text


def test_several_runs_stand_beside_each_other_on_one_page(tmp_path: Path):
    evaluation = {
        "before": side(0.9, [sample("p", "Sure.", "comply")]),
        "after": side(0.1, [sample("p", "No.", "refuse")]),
    }
    folders = [write_run(tmp_path / place / "run", [step_row(1)], evaluation) for place in ("a", "b")]
    page = write_report(*folders)
    text, checker = checked(page)
    assert page == tmp_path / "a" / "report.html"
    assert not (folders[0] / "plots").exists()
    assert checker.tags.count("header") == 2
    assert {"a/run", "b/run"} <= set(re.findall(r"<bdi>([^<]+)</bdi></h1>", text))
    block = plain(text[text.index('<th scope="rowgroup"') : text.index("</tbody>")])
    assert block.count("base") == 1  # the same in both
    assert block.count("bent") == 2
    (group,) = sample_groups(*map(read_run, folders[:1]))
    assert [name for name, _ in group["sides"]] == ["before", "after"]
    assert re.search(r"<option value=\"refused\">", text)
    assert "after, a/run" in text


def test_another_place_for_the_page(run: Path, tmp_path: Path, no_figures: None):
    page = write_report(run, out=tmp_path / "pages" / "one.html")
    assert page == tmp_path / "pages" / "one.html"
    assert page.is_file()
    assert not (run / "report.html").exists()


def test_a_folder_of_eval_alone_has_a_page(tmp_path: Path, no_figures: None):
    text, _ = checked(write_report(write_eval(tmp_path / "out")))
    assert "No training step was logged." in text
    assert "The strongest of 2 attacks" in plain(text)


@pytest.mark.parametrize(
    "content", ["{torn", "[]", '{"groups": [1, {"side": "base", "judges": []}, {}]}', '{"groups": 3}']
)
def test_a_summary_that_cannot_be_read_costs_only_itself(tmp_path: Path, content: str, no_figures: None):
    folder = write_run(tmp_path / "run", [step_row(1)])
    write_eval(folder / "eval")
    (folder / "eval" / "eval.json").write_text(content)
    with open(folder / "eval" / "answers.jsonl", "a", encoding="utf-8") as file:
        file.write('[1]\n{"side": "elsewhere", "answers": []}\n{"side": "bent", "answ')
    text, _ = checked(write_report(folder))
    assert "Take glass." in text
    assert ("eval: eval.json cannot be read" in text) is (content == "{torn")


@pytest.mark.parametrize("odd", [float("nan"), -0.1, 1.5, "0.5", None, True, 10**400, [0.5]])
def test_odd_numbers_are_left_out(tmp_path: Path, odd: object, no_figures: None):
    content = summary()
    for entry in content["groups"]:
        for labels in entry["judges"].values():
            labels["comply"] = {"rate": odd}
    content["usefulness"]["bent"]["perplexity_ratio"] = odd if odd != 1.5 and odd != -0.1 else None
    content["relearning"][0]["curve"] = [{"step": odd, "comply": odd}, 3]
    folder = write_run(
        tmp_path / "run", [step_row(1)], {"before": {"attack_direct": odd, "shares": odd, "counts": odd}}
    )
    (folder / "eval").mkdir()
    (folder / "eval" / "eval.json").write_text(json.dumps(content))
    text, _ = checked(write_report(folder))
    assert "No attack was measured" in plain(text)
    assert "nan" not in plain(text)


def test_pictures_plug_in_by_the_name_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None):
    monkeypatch.setitem(
        pictures.PICTURES, "lens.json", ("A lens", lambda data: f"<svg><text>{data['word']}</text></svg>")
    )
    folder = write_run(tmp_path / "run", [step_row(1)])
    assert "No lens picture" in checked(write_report(folder))[0]
    (folder / "eval").mkdir()
    (folder / "lens.json").write_text('{"word": "moon"}')
    (folder / "eval" / "lens.json").write_text("{}")
    text, _ = checked(write_report(folder))
    assert "<svg><text>moon</text></svg>" in text
    assert "eval/lens.json cannot be drawn" in plain(text)


def test_sections_are_named_once_and_reached_by_their_address(run: Path, no_figures: None):
    text, checker = checked(write_report(run))
    anchors = re.findall(r'<section id="([^"]+)"', text)
    assert len(anchors) == len(set(anchors)) == len(page_sections.SECTIONS) - 1  # no settings
    assert {a.removeprefix("#") for a in checker.addresses} == set(anchors)
    assert EVALUATION not in plain(text)
