"""``lens`` from the command line: what it writes, where, and what it refuses before and after loading."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tiny_run import BLOCKS, TinyRun

from repbend_fast.cli import main
from repbend_fast.report.pictures import pictures_of
from repbend_fast.report.run_record import read_run

ASK = ["--prompt", "How do I make moon-key?"]


def test_a_run_has_page_and_data_where_the_report_finds_them(
    whole: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lens", str(whole.path), *ASK, "--bending", "--rows=3", "--tokens", "5"]) == 0
    folder = whole.path / "lens"
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {folder / name}" for name in ("lens.html", "lens.json", "bending.json")
    ]
    data = json.loads((folder / "lens.json").read_text(encoding="utf-8"))
    assert [(panel["side"], panel["forced"]) for panel in data["panels"]] == [
        ("base", False),
        ("base", True),
        ("bent", False),
        ("bent", True),
    ]
    assert data["prefill"] == "Sure, here is how"
    for panel in data["panels"]:
        assert len(panel["tokens"]) == 5
        assert [len(panel[name]) for name in ("words", "probabilities", "entropies")] == [BLOCKS + 1] * 3
    free, forced = data["panels"][:2]
    assert forced["total"] > free["total"]
    assert free["entropies"] != data["panels"][2]["entropies"]
    bending = json.loads((folder / "bending.json").read_text(encoding="utf-8"))
    assert bending["counts"] == {"safe": 3, "unsafe": 3}
    assert bending["layers"][-1]["distance"]["unsafe"] > 0
    found = pictures_of(read_run(whole.path))
    assert [(picture.file, picture.problem) for picture in found] == [("lens/lens.json", ""), ("lens/bending.json", "")]
    page = (folder / "lens.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http-equiv", "")


def test_a_model_alone_has_one_side_and_a_picture_of_its_own(whole: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "new" / "picture.svg"
    words = [
        "lens",
        str(whole.model),
        "--dtype=float32",
        "--prompt",
        "x=3, name a colour",
        "--prefill=",
        "--out",
        str(out),
    ]
    assert main(words) == 0
    text = "".join(ElementTree.parse(out).getroot().itertext())
    assert "base, no forced answer" in text
    assert "bent" not in text
    assert "forced to begin" not in text
    out = tmp_path / "lens.json"
    assert main([*words[:-1], str(out), "--tokens=3"]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["prompt"] == "x=3, name a colour"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out=picture.png"], "--out=picture.png: give a file that ends in .html, .svg or .json"),
        (["--out=bending.svg", "--bending"], "--out=bending.svg"),
        (["--tokens=0"], "--tokens=0"),
        (["--prompt= "], "--prompt: is empty"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_loading(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lens", "there/is/nothing", *ASK, *words]) == 2
    assert message in capsys.readouterr().err


def test_one_side_has_no_bending_and_a_long_answer_no_room(whole: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lens", str(whole.model), *ASK, "--bending", "--out=x.json", "--dtype=float32"]) == 2
    assert "--bending compares base and bent" in capsys.readouterr().err
    assert main(["lens", str(whole.path), *ASK, "--prefill", "word " * 600]) == 2
    assert "512 positions" in capsys.readouterr().err
