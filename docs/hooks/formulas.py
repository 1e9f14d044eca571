"""Formulas of the site as MathML: browsers draw it by themselves, so a page loads nothing from elsewhere."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """mkdocs calls this with the HTML of every page.

    Raises:
        ValueError: a formula has a command that MathML has no word for.
    """
    return _FORMULA.sub(_drawn, content)


def _drawn(found: re.Match[str]) -> str:
    is_block = found[1] == "div"
    # The converter takes what \texttt holds as it stands, a backslash before `_` too.
    text = re.sub(r"\\texttt\{[^}]*\}", lambda name: name[0].replace(r"\_", "_"), html.unescape(found[2]))
    formula = convert(text, display="block" if is_block else "inline")
    if unknown := re.search(r"\\\w+", formula):
        raise ValueError(f"{unknown[0]} in {found[2]!r}: write it with other commands")
    return f'<div class="formula">{formula}</div>' if is_block else str(formula)
