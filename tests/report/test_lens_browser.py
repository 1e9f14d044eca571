"""The lens page in a browser: nothing complains, both pictures are there, a phone scrolls the picture and not the page,
and it prints. Skips where there is no Chromium.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_browser import CHROMIUM, FRAME, chromium, console
from test_lens_pictures import UGLY, bending, data, panel

from repbend_fast.report.lens_page import lens_page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]
PROBE = """<script>
const pictures = [...document.querySelectorAll("svg[role=img]")].map(svg => svg.getBoundingClientRect().width);
parent.postMessage(JSON.stringify({inner: innerWidth, width: document.documentElement.scrollWidth, pictures}), "*");
</script>"""


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_with_both_pictures(width: int, tmp_path: Path) -> None:
    both = [panel(side, forced) for side in ("base", "bent") for forced in (False, True)]
    for each in both:
        each["tokens"] = each["tokens"] * 6
        for name in ("words", "probabilities", "entropies"):
            each[name] = [row * 6 for row in each[name]]
    page = tmp_path / "page.html"
    text = lens_page(data(*both, model=UGLY, prompt=UGLY, prefill=UGLY), bending())
    page.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(name=page.name, width=width), encoding="utf-8")
    options = ("--virtual-time-budget=5000", "--window-size=1300,1000", "--dump-dom")
    process = chromium(tmp_path / "profile", frame, *options)
    assert console(process) == []
    stored = re.search(r'data-found="([^"]+)"', process.stdout)
    assert stored
    found = json.loads(stored[1].replace("&quot;", '"'))
    assert found["inner"] == width
    assert found["width"] <= width
    assert len(found["pictures"]) == 2
    assert found["pictures"][0] >= 860
    target = tmp_path / "page.pdf"
    assert console(chromium(tmp_path / "profile", page, f"--print-to-pdf={target}")) == []
    assert target.read_bytes().startswith(b"%PDF")
