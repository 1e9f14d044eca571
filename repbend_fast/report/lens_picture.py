"""The logit lens as an SVG: a heat map for each side, free and forced, of the top word at each layer and token.

Letters stay text. Blue is certain: a cell's blue fades as its entropy nears that of a guess among all words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict, cast

from markupsafe import Markup

from repbend_fast.report.ugly_text import clean, short

CELL, LINE, LEFT, TOP, GAP, FOOT = 50, 16, 34, 52, 22, 30
WORD = 7
"""Letters of a word that fit into a cell."""
MOST_SHRUNK = 860
"""Pixels below which a page scrolls the picture and shrinks it no further."""
_BLUE = "#1a5fb4"
_INK, _MUTED, _RULE = "var(--ink, #212529)", "var(--muted, #5c656d)", "var(--line, #d5dbe1)"
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "·"})


class PanelData(TypedDict):
    """One panel of the picture."""

    side: str
    forced: bool
    total: int
    tokens: list[str]
    words: list[list[str]]
    probabilities: list[list[float]]
    entropies: list[list[float]]


def lens_svg(data: Mapping[str, object]) -> str:
    """The picture of what ``repbend-fast lens`` writes as JSON.

    ``data``: ``panels``, each with ``side``, ``forced``, ``total``, ``tokens``, and ``words``, ``probabilities`` and
    ``entropies`` by layer and token; and ``vocabulary``, the number of words. Sides stand beside each other, free above
    forced.

    Raises:
        KeyError, TypeError, ValueError: data of another form.
    """
    panels = cast(list[PanelData], data["panels"])
    sides = list(dict.fromkeys(panel["side"] for panel in panels))
    most = math.log(max(2, int(cast(int, data["vocabulary"]))))
    width = max((len(panel["tokens"]) for panel in panels), default=0) * CELL + LEFT
    parts: list[Markup] = []
    y = 0
    for forced in (False, True):
        row = [panel for panel in panels if panel["forced"] is forced]
        parts += [_panel(panel, sides.index(panel["side"]) * (width + GAP), y, most) for panel in row]
        y += max((_height(panel) for panel in row), default=0)
    whole = len(sides) * (width + GAP) - GAP
    body = Markup("").join([*parts, _legend(y + 8)])
    return str(
        Markup(
            '<svg viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" style="min-width: {least}px" '
            'font-size="10.5" '
            'font-family="system-ui, sans-serif" aria-label="{label}">{body}</svg>'
        ).format(
            w=max(whole, 330),
            least=min(MOST_SHRUNK, whole),
            h=y + FOOT,
            body=body,
            label="Logit lens: the top word at each layer and token, coloured by how certain it is",
        )
    )


def _height(panel: PanelData) -> int:
    return TOP + len(panel["words"]) * LINE + GAP


def _panel(panel: PanelData, x: int, y: int, most: float) -> Markup:
    title = f"{panel['side']}, {'answer forced to begin' if panel['forced'] else 'no forced answer'}"
    hidden = int(panel["total"]) - len(panel["tokens"])
    title += f" · the last {len(panel['tokens'])} of {panel['total']} tokens" if hidden > 0 else ""
    parts = [_text(LEFT, 14, title, size=13, weight=600)]
    for column, token in enumerate(panel["tokens"]):
        parts.append(_text(LEFT + column * CELL + CELL / 2, TOP - 8, token, anchor="middle", fill=_MUTED, word=True))
    layers = len(panel["words"])
    rows = zip(panel["words"], panel["probabilities"], panel["entropies"], strict=True)
    for layer, row in reversed(list(enumerate(rows))):
        top = TOP + (layers - 1 - layer) * LINE  # the answer comes out at the top
        parts.append(_text(LEFT - 6, top + 11.5, str(layer), anchor="end", fill=_MUTED))
        for column, (word, probability, entropy) in enumerate(zip(*row, strict=True)):
            parts.append(_cell(LEFT + column * CELL, top, word, float(probability), float(entropy), most))
    return Markup('<g transform="translate({} {})">{}</g>').format(x, y, Markup("").join(parts))


def _cell(x: int, y: int, word: str, probability: float, entropy: float, most: float) -> Markup:
    certain = min(1.0, max(0.0, 1.0 - entropy / most)) if math.isfinite(entropy) else 0.0
    said = f"{_visible(word, 200)}  p = {probability:.3f}, entropy {entropy:.2f} nats"
    return Markup(
        '<g><title>{}</title><rect x="{}" y="{}" width="{}" height="{}" fill="{}" fill-opacity="{:.3f}" '
        'stroke="{}" stroke-width="0.5"/>{}</g>'
    ).format(
        said,
        x,
        y,
        CELL,
        LINE,
        _BLUE,
        certain,
        _RULE,
        _text(x + CELL / 2, y + 11.5, word, anchor="middle", fill="#ffffff" if certain > 0.55 else _INK, word=True),
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    fill: str = _INK,
    size: float | None = None,
    weight: int | None = None,
    word: bool = False,
) -> Markup:
    shown = _visible(text, WORD) if word else short(text, 120)
    extra = Markup(' font-size="{}"').format(size) if size else Markup()
    extra += Markup(' font-weight="{}"').format(weight) if weight else Markup()
    return Markup('<text x="{:g}" y="{:g}" text-anchor="{}" fill="{}"{}>{}</text>').format(
        x, y, anchor, fill, extra, shown
    )


def _visible(word: object, most: int) -> str:
    """A token with its white space to be seen, clipped."""
    text = str(clean(str(word))).translate(_VISIBLE)
    text = text[1:] if text.startswith("·") and len(text.strip("·")) > 0 else text
    return short(text, most)


def _legend(y: int) -> Markup:
    parts = [_text(LEFT, y + 11, "certain", anchor="start", fill=_MUTED)]
    steps: Sequence[float] = [1 - i / 7 for i in range(8)]
    for i, certain in enumerate(steps):
        parts.append(
            Markup(
                '<rect x="{}" y="{}" width="18" height="12" fill="{}" fill-opacity="{:.3f}" stroke="{}" '
                'stroke-width="0.5"/>'
            ).format(LEFT + 42 + i * 18, y + 1, _BLUE, certain, _RULE)
        )
    parts.append(_text(LEFT + 42 + 8 * 18 + 6, y + 11, "guessing (entropy)", fill=_MUTED))
    return Markup("").join(parts)
