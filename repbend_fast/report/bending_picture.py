"""Bending as an SVG: safe and unsafe rows of each layer in two dimensions, before and after, and how far they moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict, cast

from markupsafe import Markup

PANEL, HEAD, FOOT, GAP, PAD, COLUMNS, TOP = 166, 20, 34, 16, 12, 6, 30
MOST_PANELS = 12
MOST_SHRUNK = 860
"""Pixels below which a page scrolls the picture and shrinks it no further."""
_COLORS = {"safe": "#0072b2", "unsafe": "#d55e00"}
_INK, _MUTED, _RULE = "var(--ink, #212529)", "var(--muted, #5c656d)", "var(--line, #d5dbe1)"
_PAPER = "var(--paper, #ffffff)"


class LayerData(TypedDict):
    """One panel of the picture: ``points`` by side and kind."""

    distance: dict[str, float]
    cosine: dict[str, float]
    share: float
    points: dict[str, dict[str, list[list[float]]]]


def bending_svg(data: Mapping[str, object]) -> str:
    """The picture of what ``repbend_fast.evaluation.bending.measure_bending`` returns: a panel for each layer, or for
    twelve at even distances, the last among them. Rings are the base's rows, dots the bent model's, a line joins them.

    Raises:
        KeyError, TypeError, ValueError: data of another form.
    """
    layers = cast(list[LayerData], data["layers"])
    shown = _spread(len(layers), MOST_PANELS)
    columns = min(COLUMNS, max(1, len(shown)))
    rows = -(-len(shown) // columns)
    width = max(columns * (PANEL + GAP) - GAP, 430)
    height = TOP + rows * (HEAD + PANEL + FOOT + GAP)
    parts = [_legend()]
    for place, layer in enumerate(shown):
        x = place % columns * (PANEL + GAP)
        y = TOP + place // columns * (HEAD + PANEL + FOOT + GAP)
        parts.append(_panel(layers[layer], layer, x, y))
    return str(
        Markup(
            '<svg viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" style="min-width: {least}px" '
            'font-size="10" '
            'font-family="system-ui, sans-serif" aria-label="{label}">{body}</svg>'
        ).format(
            w=width,
            least=min(MOST_SHRUNK, width),
            h=height,
            label="Safe and unsafe rows by layer in two dimensions, before and after bending",
            body=Markup("").join(parts),
        )
    )


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` numbers at even distances, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _panel(layer: LayerData, number: int, x: int, y: int) -> Markup:
    points = layer["points"]
    place = _scale([point for side in points.values() for kind in side.values() for point in kind])
    parts = [
        _text(0, 12, f"hidden state {number}", weight=600),
        Markup(
            '<rect x="0" y="{}" width="{p}" height="{p}" fill="none" stroke="{}" rx="4"><title>{:.0%} of the variance '
            "lies in this plane</title></rect>"
        ).format(HEAD, _RULE, float(layer["share"]), p=PANEL),
    ]
    dots = []
    for kind, color in _COLORS.items():
        for before, after in zip(points["base"][kind], points["bent"][kind], strict=True):
            (x1, y1), (x2, y2) = place(before), place(after)
            parts.append(
                Markup(
                    '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{c}" stroke-opacity="0.35"/>'
                    '<circle cx="{:.1f}" cy="{:.1f}" r="2.6" fill="{paper}" stroke="{c}"/>'
                ).format(x1, y1, x2, y2, x1, y1, c=color, paper=_PAPER)
            )
            dots.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.6" fill="{}"/>').format(x2, y2, color))
    parts += dots
    for line, kind in enumerate(_COLORS):
        words = f"{kind}: moved {float(layer['distance'][kind]):.2f}, cosine {float(layer['cosine'][kind]):.2f}"
        parts.append(_text(0, HEAD + PANEL + 14 + 14 * line, words, fill=_MUTED))
    return Markup('<g transform="translate({} {})">{}</g>').format(x, y, Markup("").join(parts))


def _scale(points: Sequence[Sequence[float]]) -> Callable[[Sequence[float]], tuple[float, float]]:
    """From a point to its place in the panel; both axes have one scale, so that distances compare."""
    xs, ys = [float(p[0]) for p in points], [float(p[1]) for p in points]
    middle = ((min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2) if points else (0.0, 0.0)
    extent = max([max(xs) - min(xs), max(ys) - min(ys)] if points else [0.0]) or 1.0
    factor = (PANEL - 2 * PAD) / extent

    def place(point: Sequence[float]) -> tuple[float, float]:
        across, up = float(point[0]) - middle[0], float(point[1]) - middle[1]
        return PANEL / 2 + across * factor, HEAD + PANEL / 2 - up * factor

    return place


def _text(x: float, y: float, text: str, *, fill: str = _INK, weight: int = 400) -> Markup:
    return Markup('<text x="{:g}" y="{:g}" fill="{}" font-weight="{}">{}</text>').format(x, y, fill, weight, text)


def _legend() -> Markup:
    parts = []
    entries = [(f"{kind}, {side}", color, side) for kind, color in _COLORS.items() for side in ("base", "bent")]
    for i, (words, color, side) in enumerate(entries):
        parts.append(
            Markup('<circle cx="{}" cy="8" r="4" fill="{}" stroke="{}"/>').format(
                6 + i * 106, _PAPER if side == "base" else color, color
            )
        )
        parts.append(_text(15 + i * 106, 12, words))
    return Markup("").join(parts)
