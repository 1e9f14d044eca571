"""The docs as a site: what can be said of it without its tools, and a strict build where they are installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def nav_pages(part: object) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [page for inner in (part.values() if isinstance(part, dict) else part) for page in nav_pages(inner)]


def prose(page: Path) -> str:
    """Without code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> list[str]:
    """Of a page's headings, as Python-Markdown makes them: GitHub keeps each space and hyphen, it joins them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", head).strip().lower() for head in heads)
    return [re.sub(r"[-\s]+", "-", head) for head in plain]


def test_the_site_has_every_page_once() -> None:
    """A new page in docs/ belongs into the ``nav`` of mkdocs.yml."""
    assert SITE["docs_dir"] == "docs"
    assert sorted(nav_pages(SITE["nav"])) == [page.name for page in PAGES]


def test_files_that_the_site_names_are_there() -> None:
    named = [*SITE["hooks"], *(f"docs/{css}" for css in SITE["extra_css"])]
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_link_to_pages_and_headings_of_the_site(page: Path) -> None:
    linked = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", prose(page))
    for target, anchor in linked:
        other = DOCS / target if target else page
        assert other.is_file(), target
        assert "/" not in target, f"{target} lies outside of the site"
        assert not anchor or anchor in anchors(other), f"{target}#{anchor}"
    assert [head for head, count in Counter(anchors(page)).items() if count > 1] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_says_what_it_shows(page: Path) -> None:
    assert [alt for alt in re.findall(r"!\[([^\]]*)\]\(", prose(page)) if len(alt) < 10] == []


def formulas(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The site's hook, with a stand-in for the package that writes MathML."""
    converter = ModuleType("latex2mathml.converter")
    converter.convert = lambda text, display: f'<math display="{display}">{text.replace(chr(92) + "texttt", "")}</math>'  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "latex2mathml", ModuleType("latex2mathml"))
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", converter)
    spec = importlib.util.spec_from_file_location("formulas", DOCS / "hooks" / "formulas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_formulas_are_mathml_in_lines_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = formulas(monkeypatch)
    page = (
        '<p>a <span class="arithmatex">\\(x &lt; y\\)</span> b</p>'
        '<div class="arithmatex">\\[s\n= t\\]</div><code>\\(</code>'
    )
    assert hook.on_page_content(page, page=None, config=None, files=None) == (
        '<p>a <math display="inline">x < y</math> b</p>'
        '<div class="formula"><math display="block">s\n= t</math></div><code>\\(</code>'
    )
    named = hook.on_page_content('<span class="arithmatex">\\(\\texttt{a\\_b}\\)</span>')
    assert named == '<math display="inline">{a_b}</math>'
    with pytest.raises(ValueError, match=r"\\nonsense in"):
        hook.on_page_content('<span class="arithmatex">\\(\\nonsense x\\)</span>')


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material", "latex2mathml"))),
    reason="the docs' tools are not installed (`make docs`)",
)
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("index.html")]
    assert len(pages) == len(PAGES)
    assert not any("arithmatex" in page for page in pages)
    assert any("<math" in page for page in pages)
