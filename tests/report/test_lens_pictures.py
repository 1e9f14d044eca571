"""The lens and the bending as pictures and as a page: right words in the right cells, and ugly text harms neither."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest

from repbend_fast.report.bending_picture import bending_svg
from repbend_fast.report.lens_page import lens_page, svg_file
from repbend_fast.report.lens_picture import LINE, WORD, lens_svg

UGLY = "</text></svg><script>alert(1)</script>\"'&\u202eevil\x00\x1b\ud800" + "x" * 100_000


def panel(side: str = "base", forced: bool = False, words: Any = None, entropies: Any = None) -> dict[str, Any]:
    words = words or [["low", " mid"], ["\n", "top"]]
    return {
        "side": side,
        "forced": forced,
        "total": 9,
        "tokens": ["How", " now"],
        "words": words,
        "probabilities": [[0.25, 0.5], [0.75, 1.0]],
        "entropies": entropies or [[math.log(100), math.log(100) / 2], [0.1, 0.0]],
    }


def data(*panels: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "vocabulary": 100,
        "panels": list(panels),
        "model": "tiny",
        "adapter": None,
        "prompt": "p",
        "prefill": "",
        "notes": [],
    } | more


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_cells_stand_by_layer_and_token_and_fade_with_entropy() -> None:
    root = parsed(lens_svg(data(panel())))
    cells = [g for g in root.iter("g") if g.find("title") is not None]
    shown = {
        cell[2].text: (float(cell[1].get("x", "")), float(cell[1].get("y", "")), float(cell[1].get("fill-opacity", "")))
        for cell in cells
    }
    assert set(shown) == {"low", "mid", "↵", "top"}
    assert shown["low"][1] == shown["↵"][1] + LINE  # what the model says stands on top
    assert shown["mid"][0] > shown["low"][0]
    assert [shown[word][2] for word in ("low", "mid", "top")] == pytest.approx([0.0, 0.5, 1.0])
    assert cells[0].findtext("title") == "↵  p = 0.750, entropy 0.10 nats"
    texts = [text.text for text in root.iter("text")]
    assert "base, no forced answer · the last 2 of 9 tokens" in texts
    assert texts.count("How") == 1


def test_sides_stand_beside_each_other_and_forced_below() -> None:
    both = [panel(side, forced) for side in ("base", "bent") for forced in (False, True)]
    root = parsed(lens_svg(data(*both)))
    places = [tuple(map(int, g.get("transform", "")[10:-1].split())) for g in root if g.get("transform")]
    (free_base, free_bent, forced_base, forced_bent) = places
    assert free_base[1] == free_bent[1] < forced_base[1] == forced_bent[1]
    assert free_base[0] == forced_base[0] < free_bent[0] == forced_bent[0]
    assert float(root.get("width", "")) > free_bent[0]


class Page(HTMLParser):
    """Its tags, and what stands in ``<bdi>``."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)


def test_ugly_words_break_neither_picture_nor_page() -> None:
    ugly = panel(UGLY, words=[[UGLY, " "], ["", "\u05d0\u05d1"]], entropies=[[math.nan, math.inf], [0.0, 1.0]])
    ugly["tokens"] = [UGLY, UGLY]
    svg = lens_svg(data(ugly))
    root = parsed(svg)
    svg.encode("utf-8")
    assert not any("\u202e" in (element.text or "") for element in root.iter())
    assert all(len(text.text or "") <= 120 for text in root.iter("text"))
    assert sum(len(text.text or "") <= WORD for text in root.iter("text")) >= 6
    assert len(svg) < 20_000
    content = data(ugly, model=UGLY, adapter=UGLY, prompt=UGLY, prefill=UGLY, notes=[UGLY[:200]])
    page = lens_page(content)
    page.encode("utf-8")
    assert len(page) < 60_000
    assert "more characters" in page
    assert "script" not in Page(page).tags
    assert Page(page).tags.count("svg") == 1
    assert "\x00" not in page
    ElementTree.fromstring(svg_file(svg).encode("utf-8"))


def bending(layers: int = 3) -> dict[str, Any]:
    points = {
        "base": {"safe": [[0.0, 0.0], [1.0, 0.0]], "unsafe": [[0.0, 1.0]]},
        "bent": {"safe": [[0.0, 0.0], [1.0, 0.5]], "unsafe": [[4.0, 1.0]]},
    }
    layer = {
        "points": points,
        "share": 0.875,
        "distance": {"safe": 0.1, "unsafe": 1.234},
        "cosine": {"safe": 0.99, "unsafe": -0.5},
    }
    return {"counts": {"safe": 2, "unsafe": 1}, "layers": [layer] * layers}


def test_bending_shows_rows_before_and_after_with_distance_and_cosine() -> None:
    root = parsed(bending_svg(bending()))
    panels = [g for g in root if g.get("transform")]
    assert len(panels) == 3
    rings = [c for c in panels[0].iter("circle") if str(c.get("fill")).startswith("var(--paper")]
    assert len(rings) == 3
    assert len(list(panels[0].iter("circle"))) == 6
    lines = list(panels[0].iter("line"))
    moved = [float(line.get("x2", "")) - float(line.get("x1", "")) for line in lines]
    assert moved[:2] == [0.0, 0.0]
    assert moved[2] > 100
    assert [text.text for text in panels[2].iter("text")] == [
        "hidden state 2",
        "safe: moved 0.10, cosine 0.99",
        "unsafe: moved 1.23, cosine -0.50",
    ]
    assert "88% of the variance" in "".join(panels[0].itertext())


def test_of_many_layers_twelve_are_shown_first_and_last_among_them() -> None:
    titles = [text.text for text in parsed(bending_svg(bending(33))).iter("text") if "hidden" in str(text.text)]
    assert len(titles) == 12
    assert (titles[0], titles[-1]) == ("hidden state 0", "hidden state 32")


def test_the_page_with_both_pictures_says_of_how_many_prompts() -> None:
    page = lens_page(data(panel()), bending())
    assert Page(page).tags.count("svg") == 2
    assert "2 safe and 1 unsafe prompts" in page
