"""Names, prompts and answers that want to break the page: HTML, quotes, marks of direction, NULs, great length."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from eval_folders import answer, summary, write_eval
from test_report import checked, sample, side, step_row, write_run

from repbend_fast.report import write_report
from repbend_fast.report.inline_svg import drawn, inlined
from repbend_fast.report.plots import FIGURES
from repbend_fast.report.run_record import read_run
from repbend_fast.report.ugly_text import clean, short

UGLY = {
    "html": "</td></table></details></main><script>alert(1)</script><img src=x onerror=alert(1)>",
    "quotes": "\"' onmouseover='alert(1)' \" {{ 7 * 7 }} {% endif %} &amp; `$x_$`",
    "direction": "\u202eevil\u2067 עברית \u200f",
    "control": "a\x00b\x1b[31mc\ud800d\ufffe",
    "long": "x" * 100_000,
    "comment": '--> ]]> <!-- id="a" #212529',
}


class Words(HTMLParser):
    """Text of a page, and every tag that could run something."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.handlers += [f"{tag} {name}" for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


def ugly_run(folder: Path, text: str) -> Path:
    """A run in which everything that is free text is ``text``."""
    rows = [step_row(1) | {"terms": {text: 1.0}}, {"type": "event", "step": 1, "event": text, "reason": text}]
    samples = [sample(text, text, "comply"), sample(f"{text}2", "", text)]
    config = yaml.safe_dump(
        {"model": {"name": text}, "evaluation": {"prompts": {"path": text}}, "objective": {"name": text}}
    )
    write_run(folder, rows, {"before": side(0.5, samples), "after": side(0.1, samples)}, config)
    content = json.loads(
        json.dumps(summary()).replace('"fiction"', json.dumps(text)).replace('"gcg"', json.dumps(text))
    )
    content["relearning"][0]["records"] = text
    content["agreement"][0] |= {"judges": [text, text], "table": {text: {text: 1}}}
    content["usefulness"]["bent"][text] = 1.0
    for entry in content["groups"]:
        entry["judges"] = {text: entry["judges"]["rule"]}
    opinions = {
        text: [{"label": text, "reason": text, "helpful": text}],
        "other": [{"label": "comply", "reason": text}],
    }
    rows = [
        answer(s, 0, text, "", prompt=text, attack=text, prefills=[text], opinions=opinions) for s in ("base", "bent")
    ]
    write_eval(folder / "eval", content, [*rows, *(row | {"answers": [text, text]} for row in rows)])
    return folder


@pytest.mark.parametrize("kind", UGLY)
def test_ugly_text_breaks_neither_page_nor_table(tmp_path: Path, kind: str, no_figures: None):
    text, checker = checked(write_report(ugly_run(tmp_path / "run", UGLY[kind])))
    words = Words()
    words.feed(text)
    assert words.handlers == ["main oninput"]
    assert checker.tags.count("script") == checker.tags.count("img") == 0
    assert all(address.startswith("#") for address in checker.addresses)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", text)
    assert "".join(words.text).count(clean(UGLY[kind])[:40]) > 12
    assert len(text) < 1_500_000


@pytest.mark.parametrize("kind", UGLY)
@pytest.mark.filterwarnings("error")
def test_names_in_figures_stay_one_short_line(tmp_path: Path, kind: str):
    run = read_run(ugly_run(tmp_path / "run", UGLY[kind]))
    svg = drawn("relearning", FIGURES["relearning"], run)
    assert svg is not None
    text = inlined(svg, "relearning", UGLY[kind])
    names = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert any("rank 8" in name or name.endswith("…") for name in names)
    assert max(map(len, names)) < 400
    assert text.count("<!--") == text.count("<script") == text.count("<img") == 0


def test_marks_of_direction_are_isolated_where_they_stay(tmp_path: Path, no_figures: None):
    text, _ = checked(write_report(ugly_run(tmp_path / "run", UGLY["direction"])))
    body = text[: text.index('id="settings"')]
    for place in re.finditer("\u202e", body):
        before = body[: place.start()]
        opened = max(before.rfind("<bdi"), before.rfind("<h4>"), before.rfind("<td>"), before.rfind("<option"))
        assert opened > max(before.rfind("</bdi>"), before.rfind("</td>"), before.rfind("</option>"))


def test_short_and_clean():
    assert short("a\u202e\nb\x00") == "a b\ufffd"
    assert short("x" * 100, 10) == "x" * 9 + "…"
    assert clean("tab\tline\nbell\x07\ud800") == "tab\tline\nbell\ufffd\ufffd"
    assert clean(7) == 7
