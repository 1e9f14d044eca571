"""The pages and files of ``repbend-fast lens``: self-contained, light and dark, whatever the texts hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import cast

from markupsafe import Markup

from repbend_fast.report.bending_picture import bending_svg
from repbend_fast.report.lens_picture import lens_svg
from repbend_fast.report.ugly_text import clean, name, short

LONGEST = 4000
"""Characters of a prompt or a forced answer on the page."""
_SVG_STYLE = (
    "<style>svg { color-scheme: light dark; background: var(--paper); "
    "--ink: #212529; --muted: #5c656d; --line: #d5dbe1; --paper: #ffffff } @media (prefers-color-scheme: dark) "
    "{ svg { --ink: #e6eaee; --muted: #a3adb7; --line: #39424b; --paper: #1b2127 } }</style>"
)
_PAGE = Markup(
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="color-scheme" content="light dark">\n<title>Logit lens of {title} · repbend-fast</title>\n'
    "<style>\n{style}\n.scrolled svg {{ display: block; height: auto; width: 100%; }}\n</style>\n"
    "</head>\n<body>\n<main>\n"
    "<header><h1>Logit lens of {model}</h1>\n<p>{about}</p></header>\n{body}\n</main>\n</body>\n</html>\n"
)


def lens_page(data: Mapping[str, object], bending: Mapping[str, object] | None = None) -> str:
    """One HTML page that loads nothing: the prompt, the lens, and the bending picture where there is one.

    ``data``: as :func:`repbend_fast.report.lens_picture.lens_svg` takes it, with ``model``, ``adapter``, ``prompt``,
    ``prefill`` and ``notes``.
    """
    adapter = Markup(" · bent by {}").format(name(data["adapter"])) if data.get("adapter") else Markup()
    notes = cast(Sequence[str], data.get("notes", ()))
    body = [
        _words("Prompt", str(data["prompt"])),
        _words("Forced answer", str(data["prefill"])) if data.get("prefill") else Markup(),
        *(Markup('<p class="warning">{}</p>').format(clean(line)) for line in notes),
        _figure(
            "The top word at each layer and token",
            lens_svg(data),
            "Each hidden state through the final norm and the output head. Blue is certain, without colour is "
            "guessing; the topmost line is what the model says. Point at a cell for its probability and entropy.",
        ),
    ]
    if bending is not None:
        counts = cast(Mapping[str, int], bending["counts"])
        body.append(
            _figure(
                "Safe and unsafe rows, layer by layer",
                bending_svg(bending),
                f"Hidden states at the last token of {counts['safe']} safe and "
                f"{counts['unsafe']} unsafe prompts, in the plane where each layer's rows spread most. "
                "Moved: the distance to the base's row as a share of its length. Cosine: with the base's row.",
            )
        )
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return str(
        _PAGE.format(
            title=short(data["model"]),
            model=name(data["model"]),
            style=Markup(style),
            about=Markup("Base") + (Markup(" and bent beside each other") + adapter if adapter else Markup()),
            body=Markup("\n").join(body),
        )
    )


def svg_file(svg: str) -> str:
    """A picture as a file of its own, light and dark."""
    head, rest = svg.split(">", 1)
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}>{_SVG_STYLE}{rest}\n'


def _words(title: str, text: str) -> Markup:
    """What was asked, clipped with a line that says so."""
    more = len(text) - LONGEST
    note = Markup('<span class="muted"> … {:,} more characters</span>').format(more) if more > 0 else Markup()
    return Markup('<h2>{}</h2>\n<div class="prompt"><bdi>{}</bdi>{}</div>').format(title, clean(text[:LONGEST]), note)


def _figure(title: str, svg: str, caption: str) -> Markup:
    return Markup(
        '<h2>{t}</h2>\n<figure><div class="scrolled" tabindex="0" role="region" aria-label="{t}">{}</div>'
        "<figcaption>{}</figcaption></figure>"
    ).format(Markup(svg), caption, t=title)
