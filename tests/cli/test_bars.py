"""Bars on a terminal and lines elsewhere, for waits that are counted and for those that nobody can count."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from repbend_fast import console
from repbend_fast.console import CountLine, ProgressLine, busy, counted, say, saying


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is drawn on a terminal."""
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=140, color_system=None)
    monkeypatch.setattr(console, "terminal_console", lambda: terminal)
    return file


def last_frame(text: str) -> list[str]:
    """The lines below the last thing that was erased, without control codes."""
    import re

    frame = text.split("\x1b[2K")[-1]
    return [line.strip() for line in re.sub(r"\x1b\[[\d;?]*\w", "", frame).splitlines() if line.strip()]


def test_a_bar_inside_of_another_is_a_line_below_it_and_goes(drawn: io.StringIO) -> None:
    with ProgressLine(5, 0) as outer:
        outer.update(1, 0.5, {"safe": 0.25}, 100.0)
        with CountLine("answers", 8, stays=False) as inner:
            inner.advance("attacks", 3)
            inner._bar._lines.refresh()  # type: ignore[union-attr]
            both = last_frame(drawn.getvalue())
        outer.update(2, 0.4, {"safe": 0.2}, 100.0)
    assert any(line.startswith("answers") and "3/8" in line for line in both)
    assert any("safe 0.250" in line for line in drawn.getvalue().splitlines())
    assert "bending" in last_frame(drawn.getvalue())[-1]
    assert "2/5" in last_frame(drawn.getvalue())[-1]
    assert console._LiveBar._drawn is None


def test_a_bar_says_which_time_is_left_and_counts_only_what_is_counted(drawn: io.StringIO) -> None:
    with ProgressLine(4, 0) as bar, busy("reading"):
        for step in range(1, 4):
            bar.update(step, 0.5, {}, 1.0)
        bar._bar._lines.refresh()  # type: ignore[union-attr]
        lines = last_frame(drawn.getvalue())
    assert any("3/4" in line and " left" in line for line in lines)
    (wait,) = (line for line in lines if line.startswith("reading"))
    assert not any(sign in wait for sign in "/?-")
    assert "left" not in wait


def test_a_bar_whose_total_grows_still_says_what_is_left(drawn: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with CountLine("answers", 3, stays=False) as progress:
        for _ in range(2):
            clock[0] += 20.0
            progress.expect(1)
            progress.advance("attacks")
        progress._bar._lines.refresh()  # type: ignore[union-attr]
        (line,) = last_frame(drawn.getvalue())
    assert "2/5" in line
    assert "60 s left" in line


def test_what_is_left_of_kinds_that_have_not_begun_is_not_said_to_be_nothing() -> None:
    said: list[str] = []
    with saying(said.append), CountLine("planning", 0, seconds=0, kinds={}) as progress:
        progress.expect(1, "pieces")
        progress.expect(3, "whole")
        progress.advance("safe", kind="pieces")
    assert said == ["planning 1/4  safe"]


def test_a_line_that_is_said_meanwhile_is_kept(drawn: io.StringIO) -> None:
    with CountLine("answers", 2) as progress:
        progress.advance("x")
        say("by the way")
    assert "by the way" in drawn.getvalue()


def test_a_wait_moves_on_a_terminal_and_leaves_nothing(drawn: io.StringIO) -> None:
    with busy("planning the memory"):
        assert console._LiveBar._drawn is not None
    assert "planning the memory" in drawn.getvalue()
    assert last_frame(drawn.getvalue()) == []
    assert console._LiveBar._drawn is None


def test_a_wait_that_fails_takes_its_line_away(drawn: io.StringIO) -> None:
    with pytest.raises(ValueError), busy("planning"):
        raise ValueError
    assert console._LiveBar._drawn is None


def test_a_wait_is_a_line_elsewhere_if_it_was_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    said: list[str] = []
    with saying(said.append):
        with busy("planning"):
            clock[0] += 3.0
        assert said == []
        with busy("planning"):
            clock[0] += 32.0
    assert said == ["planning: 32 s"]
    with busy("planning"):
        clock[0] += 32.0
    assert capsys.readouterr() == ("", "planning: 32 s\n"), "standard output is for results"


def test_counted_things_come_in_order_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    said: list[str] = []
    found = []
    with saying(said.append):
        for thing in counted("loading weights", {"a": 1, "b": 2, "c": 3}.items()):
            found.append(thing)
            clock[0] += 10.0
    assert found == [("a", 1), ("b", 2), ("c", 3)]
    assert said == ["loading weights 2/3    10 s left"]


def test_lines_of_a_count_leave_standard_output_to_results(capsys: pytest.CaptureFixture[str]) -> None:
    with CountLine("answers", 2, seconds=0) as progress:
        progress.advance("attacks")
    assert capsys.readouterr() == ("", "answers 1/2  attacks  0 s left\n")


def test_nothing_is_drawn_where_nobody_listens(drawn: io.StringIO) -> None:
    with saying(None), CountLine("answers", 2) as progress, busy("planning"):
        progress.advance("x")
        say("unheard")
    assert drawn.getvalue() == ""
