"""Figures as SVG: files that any program shows, and the same pictures inside of a page, in the page's colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from repbend_fast.report.plots import COLORS, INK, LINE, MUTED, OUTCOME_COLORS, PAPER

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

_SETTINGS: dict[RcKeyType, object] = {
    "svg.fonttype": "none",  # letters stay text, to be selected and searched
    "text.parse_math": False,  # names of runs and attacks may hold a dollar sign
    "grid.color": LINE,
    "axes.facecolor": "none",
}
_PAGE_COLORS = {
    INK: "var(--ink)",
    COLORS["loss"]: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--paper)",
    **{color: f"var(--{outcome})" for outcome, color in OUTCOME_COLORS.items()},
}
_PIXELS_PER_POINT = 100 / 72
# Axes are as large as their data, so nothing has to be clipped.
_NOT_IN_A_PAGE = re.compile(
    r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<clipPath.*?</clipPath>|\sclip-path=\"[^\"]*\"", re.DOTALL
)


def drawn(name: str, draw: Callable[..., Figure | None], *runs: object, narrow: bool = False) -> str | None:
    """The SVG file of a figure, the same bytes each time; None where there is nothing to draw."""
    with rc_context(_SETTINGS | {"svg.hashsalt": f"{name}{narrow}"}), warnings.catch_warnings():
        # A label's letters come from the reader's fonts, whatever the one that the layout was measured with lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = draw(*runs, narrow=narrow)
        if figure is None:
            return None
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    return buffer.getvalue()


def inlined(svg: str, prefix: str, label: str) -> Markup:
    """The ``<svg>`` of a file for a page: no declaration, no address of any standard, no size of its own, fonts and
    grey of the page, and names that no other figure's have: ``prefix`` goes before each. ``label``: what it shows, for
    readers who do not see it.
    """
    text = svg[svg.index("<svg") :].strip()
    text = _NOT_IN_A_PAGE.sub("", text)
    used = set(re.findall(r'href="#([^"]+)"', text))
    text = re.sub(r'\sid="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}-\1"', text)
    text = re.sub(r"font: (?:\w+ )*?([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    for color, variable in _PAGE_COLORS.items():
        text = text.replace(color, variable)
    head, rest = text.split(">", 1)
    width = re.search(r'width="([\d.]+)pt"', head)
    box = re.search(r'viewBox="[^"]+"', head)
    assert width is not None, head
    assert box is not None, head
    most = float(width[1]) * _PIXELS_PER_POINT
    head = Markup('<svg {} style="max-width: {:.0f}px" role="img" aria-label="{}">').format(Markup(box[0]), most, label)
    return head + Markup(rest)
