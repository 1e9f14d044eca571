"""Pictures of the files that other commands leave in a run's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from repbend_fast.errors import one_line
from repbend_fast.report.bending_picture import bending_svg
from repbend_fast.report.eval_record import json_mapping
from repbend_fast.report.lens_picture import lens_svg
from repbend_fast.report.run_record import RunRecord

PICTURES: dict[str, tuple[str, Callable[[Mapping[str, object]], str]]] = {
    "lens.json": ("Logit lens: the top word at each layer and token", lens_svg),
    "bending.json": ("Safe and unsafe rows, layer by layer", bending_svg),
}
"""By the name of a JSON file, at any place down to two folders deep in a run's: a title, and what makes an ``<svg>`` of
the file's content. ``repbend-fast lens`` writes these files.

The ``<svg>`` goes into the page as it is: its maker escapes all text from models, and may use the page's colours
(``var(--ink)``, ``var(--muted)``, ``var(--line)``; ``page.css``).
"""
_PLACES = ("", "*/", "*/*/")


@dataclass(frozen=True, slots=True)
class Picture:
    """``problem``: why there is no ``svg``."""

    title: str
    file: str
    svg: Markup
    problem: str = ""


def pictures_of(run: RunRecord) -> list[Picture]:
    """The run's pictures by kind and place. A file that cannot be drawn gives a line that names it."""
    out = []
    for name, (title, draw) in PICTURES.items():
        for path in sorted({path for place in _PLACES for path in run.folder.glob(place + name)}):
            file = path.relative_to(run.folder).as_posix()
            content, problem = json_mapping(path)
            svg = Markup()
            try:
                svg = Markup(draw(content)) if not problem else svg
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                problem = f"{file} cannot be drawn ({one_line(error)}); repbend-fast lens makes it again"
            out.append(Picture(title, file, svg, problem))
    return out
