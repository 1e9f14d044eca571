"""Medians and spreads, and how they are written."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from repbend_fast.compare import tables
from repbend_fast.compare.comparison import Method, check_equal
from repbend_fast.compare.picture import BARS, draw
from repbend_fast.compare.results import method_record
from repbend_fast.config import load_config
from repbend_fast.report.plots import RATE_COLORS


def seed(number: int, **values: Any) -> dict[str, Any]:
    found = {
        "attack_direct": 0.25,
        "attack_direct_refused": 0.75,
        "attack_direct_degenerate": 0.0,
        "attack_prefill": 0.5,
        "attack_prefill_refused": 0.125,
        "attack_prefill_degenerate": 0.375,
        "helpful_ordinary": 0.9,
        "refused_ordinary": 0.02,
        "degenerate_ordinary": 0.0,
        "helpful_borderline": 0.8,
        "refused_borderline": 0.1,
        "degenerate_borderline": 0.01,
    }
    costs = {
        "perplexity": 33.0,
        "perplexity_ratio": 1.1,
        "kl": 0.05,
        "seconds": 100.0,
        "peak_memory_bytes": 2**30,
        "best_step": 20,
    }
    return {"seed": number, **found, **costs, **values}


def record(*seeds: dict[str, Any]) -> dict[str, Any]:
    method = method_record("rmu", "demo-rmu", 1e-3, seeds)
    settings = {"model": "M", "steps": 40, "batch": 2, "seeds": [s["seed"] for s in seeds], "rates": [1e-3, 3e-3]}
    before = {"attack_direct": 1.0, "helpful_ordinary": 0.95, "perplexity": 30.0, "perplexity_ratio": 1.0, "kl": 0.0}
    return {"settings": settings, "search": {"demo-rmu": {"why": "it was best"}}, "methods": [method], "before": before}


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_median_and_spread_over_three_seeds() -> None:
    method = method_record("m", "r", 1e-3, [seed(0, kl=0.3), seed(1, kl=0.1), seed(2, kl=0.2)])
    assert (method["median"]["kl"], method["spread"]["kl"]) == (0.2, [0.1, 0.3])
    assert (method["median"]["seconds"], method["spread"]["seconds"]) == (100.0, [100.0, 100.0])


@pytest.mark.parametrize("missing", [None, float("inf"), float("nan")])
def test_a_measure_that_one_seed_lacks_has_no_median(missing: float | None) -> None:
    method = method_record("m", "r", 1e-3, [seed(0), seed(1, perplexity=missing)])
    assert "perplexity" not in method["median"]
    assert "perplexity" not in method["spread"]
    assert tables.cells(method)["perplexity"] == "–"


def test_one_seed_is_written_without_a_spread() -> None:
    header, _, *rows = table_rows(tables.markdown(record(seed(0))))
    assert header == ["", "before", "rmu"]
    assert {name: value for name, _, value in rows} == {
        "learning rate": "0.001",
        "direct attacks: complied": "25.0 %",
        "direct attacks: refused": "75.0 %",
        "direct attacks: degenerate": "0.0 %",
        "prefilled attacks: complied": "50.0 %",
        "prefilled attacks: refused": "12.5 %",
        "prefilled attacks: degenerate": "37.5 %",
        "ordinary: helpful": "90.0 %",
        "ordinary: refused": "2.0 %",
        "ordinary: degenerate": "0.0 %",
        "borderline: helpful": "80.0 %",
        "borderline: refused": "10.0 %",
        "borderline: degenerate": "1.0 %",
        "KL": "0.0500",
        "perplexity": "33.00",
        "× before": "1.100",
        "seconds of training": "100",
        "peak memory": "1.00 GiB",
    }
    before = {name: value for name, value, _ in rows}
    assert (before["learning rate"], before["direct attacks: complied"]) == ("", "100.0 %")
    assert before["prefilled attacks: complied"] == before["direct attacks: refused"] == "–"
    assert (before["seconds of training"], before["peak memory"]) == ("", "")


def test_several_seeds_are_written_with_their_spread() -> None:
    text = tables.markdown(
        record(seed(0, attack_direct=0.5), seed(1, attack_direct=0.0, peak_memory_bytes=3 * 2**29), seed(2))
    )
    assert "M, 40 steps of 2 examples, seeds 0, 1, 2: median (lowest–highest)." in text
    rows = {name: value for name, _, value in table_rows(text)}
    assert rows["direct attacks: complied"] == "25.0 % (0.0–50.0)"
    assert rows["direct attacks: refused"] == "75.0 % (75.0–75.0)"
    assert rows["peak memory"] == "1.00 GiB (1.00–1.50)"


OLD = {
    "counts": {"attack_direct": 48, "attack_prefill": 48},
    "attack_direct": 0.5,
    "attack_prefill": 0.5,
    "helpful_ordinary": 0.9,
    "helpful_borderline": 0.8,
    "degenerate_ordinary": 0.0,
}


def test_a_seed_measured_before_the_shares_were_kept_leaves_dashes() -> None:
    old = {"seed": 1, **OLD, "seconds": 90.0, "peak_memory_bytes": 2**30, "best_step": 10}
    drawn = record(seed(0), old)
    rows = {name: value for name, _, value in table_rows(tables.markdown(drawn))}
    assert rows["direct attacks: complied"] == "37.5 % (25.0–50.0)"
    assert rows["direct attacks: refused"] == rows["prefilled attacks: degenerate"] == rows["ordinary: refused"] == "–"
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(tables.terminal(drawn, 120))
    assert "direct attacks: refused" in console.export_text()
    assert draw(drawn).axes


@pytest.mark.parametrize("name", ["compare.json", "compare_methods.json"])
def test_the_recorded_comparisons_are_what_the_results_show(name: str) -> None:
    root = Path(__file__).parents[2]
    recorded = json.loads((root / "benchmarks/results" / name).read_text(encoding="utf-8"))
    results = (root / "docs/results.md").read_text(encoding="utf-8")
    assert "\n".join(tables.markdown_tables(recorded)) in results
    assert tables.remarks(recorded)
    assert all(remark in results for remark in tables.remarks(recorded))


def many() -> dict[str, Any]:
    """Eight methods of two kinds, each with two seeds."""
    drawn = record(seed(0), seed(1))
    drawn["methods"] = [
        method_record(
            f"method-{i}",
            f"recipe-{i}",
            1e-3,
            [seed(0, attack_direct=0.02 * i), seed(1)],
            ("unlearning", "bending")[i % 2],
        )
        for i in range(8)
    ]
    drawn["search"] = {f"recipe-{i}": {"why": "it was best"} for i in range(8)}
    return drawn


def test_many_methods_stand_one_below_the_other_and_then_by_kind() -> None:
    text = tables.markdown(many())
    header, _, before, *rows = table_rows(text)[:11]
    assert header[:3] == [
        "method",
        "direct attacks: complied / refused / degenerate, %",
        "prefilled attacks: complied / refused / degenerate, %",
    ]
    assert before == ["before", "100 / – / –", "– / – / –", "95 / – / –", "– / – / –", "0.0000", ""]
    assert [row[0] for row in rows] == [f"method-{i}" for i in (1, 3, 5, 7, 0, 2, 4, 6)]
    assert rows[1] == ["method-3", "16 (6–25) / 75 / 0", "50 / 12 / 38", "90 / 2 / 0", "80 / 10 / 1", "0.0500", "100"]
    parts = text.split("\n\n")
    assert (parts[2], parts[4]) == ("Bending:", "Unlearning:")
    assert table_rows(parts[3])[0] == ["", "before", *(f"method-{i}" for i in (1, 3, 5, 7))]
    assert table_rows(parts[5])[0] == ["", "before", *(f"method-{i}" for i in (0, 2, 4, 6))]


@pytest.mark.parametrize("width", [80, 120])
def test_many_methods_fit_into_a_terminal(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tables.terminal(many(), width))
    text = console.export_text()
    assert all(f"method-{i}" in text for i in range(8))
    assert "16/75/0" in text
    assert "…" not in text
    assert len(text.splitlines()) <= 20


def test_the_choice_and_a_seed_that_kept_nothing_stand_below_the_table() -> None:
    text = tables.markdown(record(seed(0), seed(7, best_step=0)))
    assert "- rmu: learning rate 0.001; it was best\n" in text
    assert "No adapter of rmu with seed 7 stayed within validation's limits" in text
    assert "No adapter" not in tables.markdown(record(seed(0)))


def test_refusals_that_only_evade_are_counted_below_the_table() -> None:
    counts = {"attack_direct": 8, "attack_prefill": 8}
    evading = seed(0, counts=counts, evasive={"attack_direct": 5, "attack_prefill": 1})
    assert "rmu 6 of 7." in tables.markdown(record(evading))
    assert "rmu 9 of 14." in tables.markdown(record(evading, seed(1, counts=counts, evasive={"attack_direct": 3})))
    assert "refusal phrase" not in tables.markdown(record(seed(0, counts=counts, evasive={})))


def test_a_step_before_the_last_that_was_kept_is_named() -> None:
    text = tables.markdown(
        record(seed(0, best_step=20, steps=60), seed(1, best_step=60, steps=60), seed(2, best_step=0, steps=60))
    )
    assert "Kept before training's end, by validation: rmu with seed 0 of step 20 of 60." in text


@pytest.mark.parametrize(("width", "shown"), [(120, "12.5 % (0.0–25.0)"), (50, "12.5 %")])
def test_the_terminal_shows_the_same_values_and_spreads_where_there_is_room(width: int, shown: str) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tables.terminal(record(seed(0), seed(1, attack_direct=0.0)), width))
    text = console.export_text()
    for part in (shown, "seconds of training", "1.00 GiB", "before", "rmu", "of 2 seeds"):
        assert part in text
    assert "…" not in text
    assert ("(0.0–25.0)" in text) is (width == 120)


def test_the_picture_has_a_bar_per_rate_and_a_whisker_per_spread() -> None:
    drawn = record(seed(0, attack_direct=0.5), seed(1, attack_direct=0.1), seed(2, attack_direct=0.2))
    [axes] = draw(drawn).axes
    bars = [
        bar
        for container in axes.containers
        if hasattr(container, "patches")
        for bar in container.patches
        if bar.get_height() > 0
    ]
    assert sorted(round(bar.get_height(), 6) for bar in bars) == sorted([100, 95, 20, 75, 50, 12.5, 90, 80])
    [whisker] = [container for container in axes.containers if not hasattr(container, "patches")]
    [[low, high]] = [[point[1] for point in segment] for segment in whisker[2][0].get_segments()]
    assert (low, high) == (pytest.approx(10), pytest.approx(50))
    assert set(BARS) <= set(RATE_COLORS)


def test_the_picture_of_many_methods_has_a_line_for_each() -> None:
    figure = draw(many())
    assert figure.get_size_inches()[0] < 12
    direct, prefilled, helpful = figure.axes
    names = [label.get_text() for label in direct.get_yticklabels()]
    assert names == ["before", *(f"method-{i}" for i in (1, 3, 5, 7, 0, 2, 4, 6))]
    complied, refused, degenerate = (container.patches for container in direct.containers[:3])
    third = names.index("method-3")
    shares = [bar.get_width() for bar in (complied[third], refused[third], degenerate[third])]
    assert shares == pytest.approx([15.5, 75.0, 0.0])
    assert (complied[third].get_x(), refused[third].get_x()) == (0.0, pytest.approx(15.5))
    assert prefilled.containers[0].patches[third].get_width() == pytest.approx(50.0)
    ordinary, borderline = (line for line in helpful.lines if line.get_label() in ("ordinary", "borderline"))
    assert (ordinary.get_xdata()[third], borderline.get_xdata()[third]) == (pytest.approx(90.0), pytest.approx(80.0))


def test_methods_of_one_kind_stand_together() -> None:
    whole = record(seed(0))
    kinds = {"npo": "unlearning", "lat": "adversarial", "repbend": "bending", "wga": "unlearning"}
    whole["methods"] = [method_record(name, "demo-rmu", 1e-3, [seed(0)], kind) for name, kind in kinds.items()]
    head, _, kind, *_ = table_rows("\n".join(tables.markdown_table(whole)))
    assert head[2:] == ["repbend", "npo", "wga", "lat"]
    assert kind[0] == "kind"
    assert kind[2:] == ["bending", "unlearning", "unlearning", "adversarial"]


def test_a_record_without_kinds_keeps_its_order_and_has_no_row_for_them() -> None:
    whole = record(seed(0))
    methods = [method_record(name, "demo-rmu", 1e-3, [seed(0)]) for name in ("wga", "repbend")]
    whole["methods"] = [{key: value for key, value in method.items() if key != "kind"} for method in methods]
    head, _, first, *_ = table_rows("\n".join(tables.markdown_table(whole)))
    assert head[2:] == ["wga", "repbend"]
    assert first[0] == "learning rate"


@pytest.mark.parametrize(
    ("recipe", "overlays", "kind"),
    [
        ("demo", (), "bending"),
        ("demo", ("adversarial",), "adversarial"),
        ("demo-lat", (), "adversarial"),
        *((f"demo-{name}", (), "unlearning") for name in ("rmu", "npo", "simnpo", "wga", "sat-imp", "undial", "ce-u")),
        *((f"demo-{name}", (), "bending") for name in ("circuit-breaker", "crl", "crl-cosine", "x-boundary")),
    ],
)
def test_the_demo_s_methods_have_a_kind_and_can_be_compared(recipe, overlays, kind) -> None:
    config = load_config(recipe, overlays=overlays)
    assert config.objective.kind == kind
    check_equal([Method("first", "demo", load_config("demo")), Method(recipe, f"{recipe}-too.yaml", config)])
