"""How far an evaluation is: one bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from repbend_fast import console
from repbend_fast.console import CountLine, saying


def test_on_a_terminal_a_bar_counts_and_keeps_the_names_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    terminal = Console(file=drawn, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(console, "terminal_console", lambda: terminal)
    with CountLine("answers", 4, 1) as progress:
        progress.advance("base [red] direct", 2)
        progress.expect(2)
        progress.advance("bent [/] prefill")
        progress.end_part("bent [/] prefill")
    text = drawn.getvalue()
    assert "answers" in text
    assert "4/6" in text
    assert "bent [/] prefill" in text
    assert "0:00:00" in text


def test_elsewhere_lines_come_at_the_end_of_a_part_and_in_between_now_and_then() -> None:
    said: list[str] = []
    with saying(said.append), CountLine("answers", 6, 2, seconds=1e9) as progress:
        progress.advance("base direct")
        progress.advance("base direct")
        assert said == []
        progress.end_part("base direct")
        progress.end_part("base direct")
        progress.advance("bent direct", 2)
        progress.end_part("bent direct")
    assert said[0].startswith("answers 4/6  base direct  ")
    assert said[0].endswith(" left")
    assert said[1:] == ["answers 6/6  bent direct"]
    with saying(said.append), CountLine("answers", 3, seconds=0) as progress:
        progress.advance("x")
    assert said[2].startswith("answers 1/3  x")


def test_what_is_left_goes_by_the_pace_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow things behind a quick one: the quick one's pace says little of them, and once known they count."""
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    said: list[str] = []
    with saying(said.append), CountLine("answers", 8, 1, seconds=1e9, kinds={"direct": 3, "gcg": 4}) as progress:
        for kind, seconds in (("direct", 1.0), ("gcg", 100.0), ("direct", 3.0)):
            clock[0] += seconds
            progress.advance(kind, kind=kind)
            progress.end_part(kind)
        progress.expect(2, "relearning")
        clock[0] += 2.0
        progress.advance("direct", kind="direct")
        progress.end_part("direct")
    assert said == [
        "answers 2/8  direct  over 2 s left",
        "answers 3/8  gcg  5 min left",
        "answers 4/8  direct  5 min left",
        "answers 5/10  direct  over 5 min left",
    ]
