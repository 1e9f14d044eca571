"""Rows on disk: any text comes back as it was, a torn end is dropped, anything else is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repbend_fast.assessment.answers import RowFile
from repbend_fast.errors import UserError

UGLY = (
    "<script>alert('x')</script> \"quoted\" [red]not markup[/red] \\ back",
    "right \u202e to left \u200f and \u2066isolated\u2069",
    "ends\u2028of\u2029lines\u0085and\r\nmore\x00\x1b[31m",
    "half a pair \ud83d",
    "whole 😀 and cjk 漢字",
    "x" * 100_000,
    "",
)


def test_any_text_comes_back_and_stays_on_its_line(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    rows = [{"text": text, "number": float("nan") if n == 0 else n} for n, text in enumerate(UGLY)]
    for row in rows:
        file.append(row)
    read = RowFile(file.path).read(["text"])
    assert [row["text"] for row in read] == list(UGLY)
    assert [row["number"] for row in read] == [None, 1, 2, 3, 4, 5, 6]
    data = file.path.read_bytes()
    data.decode("utf-8")
    assert len(data.decode("utf-8").splitlines()) == len(UGLY)
    file.rewrite(read)
    assert file.path.read_bytes() == data


@pytest.mark.parametrize(
    "torn", [b'{"a"', b'{"a": 1}', b"\xff\xfe", b"{"], ids=["begun", "no end", "no utf-8", "brace"]
)
def test_a_torn_last_line_is_dropped_and_the_next_row_is_whole(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n' + torn)
    file = RowFile(path)
    assert file.read(["a"]) == [{"a": 1}, {"a": 2}]
    file.append({"a": 3})
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"a": 1},
        {"a": 2},
        {"a": 3},
    ]


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"b": 1}', b""])
def test_another_line_that_is_no_row_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not a row of an evaluation"):
        RowFile(path).read(["a"])


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert RowFile(tmp_path / "none.jsonl").read(["a"]) == []
