"""Medians and spreads, and how they are written."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from repbend_fast.compare import tables
from repbend_fast.compare.picture import BARS, draw
from repbend_fast.compare.results import method_record
from repbend_fast.report.plots import RATE_COLORS


def seed(number: int, **values: Any) -> dict[str, Any]:
    found = {"attack_direct": 0.25, "attack_prefill": 0.5, "helpful_ordinary": 0.9, "helpful_borderline": 0.8, "degenerate_ordinary": 0.0}
    costs = {"perplexity": 33.0, "perplexity_ratio": 1.1, "kl": 0.05, "seconds": 100.0, "peak_memory_bytes": 2**30, "best_step": 20}
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
    header, _, before, row = table_rows(tables.markdown(record(seed(0))))
    assert dict(zip(header, row, strict=True)) == {
        "method": "rmu",
        "learning rate": "0.001",
        "attack, direct": "25.0 %",
        "attack, prefilled": "50.0 %",
        "helpful, ordinary": "90.0 %",
        "helpful, borderline": "80.0 %",
        "degenerate": "0.0 %",
        "KL": "0.0500",
        "perplexity": "33.00",
        "× before": "1.100",
        "seconds of training": "100",
        "peak memory": "1.00 GiB",
    }
    assert before[:3] == ["before", "", "100.0 %"]
    assert before[3] == "–"
    assert before[-2:] == ["", ""]


def test_several_seeds_are_written_with_their_spread() -> None:
    text = tables.markdown(record(seed(0, attack_direct=0.5), seed(1, attack_direct=0.0, peak_memory_bytes=3 * 2**29), seed(2)))
    assert "M, 40 steps of 2 examples, seeds 0, 1, 2: median (lowest–highest)." in text
    row = table_rows(text)[-1]
    assert row[2] == "25.0 % (0.0–50.0)"
    assert row[-1] == "1.00 GiB (1.00–1.50)"


def test_the_choice_and_a_seed_that_kept_nothing_stand_below_the_table() -> None:
    text = tables.markdown(record(seed(0), seed(7, best_step=0)))
    assert "- rmu: learning rate 0.001; it was best\n" in text
    assert "No adapter of rmu with seed 7 stayed within validation's limits" in text
    assert "No adapter" not in tables.markdown(record(seed(0)))


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
    bars = [bar for container in axes.containers if hasattr(container, "patches") for bar in container.patches if bar.get_height() > 0]
    assert sorted(round(bar.get_height(), 6) for bar in bars) == sorted([100, 95, 20, 50, 90, 80])
    [whisker] = [container for container in axes.containers if not hasattr(container, "patches")]
    [[low, high]] = [[point[1] for point in segment] for segment in whisker[2][0].get_segments()]
    assert (low, high) == (pytest.approx(10), pytest.approx(50))
    assert set(BARS) <= set(RATE_COLORS)
