"""The page in a browser: headless Chromium opens it at a phone's and at a desk's width, in both colour schemes, uses
the filters, and prints it. Skips where there is no Chromium.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from eval_folders import answer, summary, write_eval
from test_report import event, sample, side, step_row, validation_row, write_run

from repbend_fast.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (chromium, chromium-browser, google-chrome)"),
]
PROBE = """<script>
const all = selector => [...document.querySelectorAll(selector)];
const shown = element => element.getClientRects().length > 0;
const found = {
  inner: innerWidth, width: document.documentElement.scrollWidth,
  ground: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  pictures: all(".picture svg").filter(shown).map(svg => svg.getAttribute("aria-label")),
  bars: all("svg.bar").filter(svg => svg.getBoundingClientRect().width > 40).length,
  tables: all("table").filter(shown).length,
  smallest: Math.min(...all(".picture text").filter(shown).map(text => text.getBoundingClientRect().height)),
  unreachable: all("summary, select, input, a, .scrolled").filter(element => element.tabIndex < 0).length,
};
const finder = all(".finder").at(-1);
const use = (selector, value) => {
  const field = finder.querySelector(selector);
  field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
  return finder.parentElement.querySelectorAll(".sample:not([hidden])").length;
};
finder.parentElement.open = true;
found.matches = [use("input", ""), use("input", "WAY 3?"), use("input", "")];
found.matches.push(use("label:nth-of-type(2) select", "complied"), use("input", "nowhere"));
found.output = finder.querySelector("output").value;
parent.postMessage(JSON.stringify(found), "*");
</script>"""
# No window is narrower than 500 pixels, but a frame is.
FRAME = """<!doctype html><script>
onmessage = event => document.documentElement.setAttribute("data-found", event.data);
</script><iframe src="{name}" style="width: {width}px; height: 900px; border: 0"></iframe>"""


def chromium(folder: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    common = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder}"]
    return subprocess.run(
        [CHROMIUM, *common, *options, page.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )


def console(process: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in process.stderr.splitlines() if "CONSOLE" in line]


def probed(folder: Path, page: Path, width: int, *options: str) -> dict[str, Any]:
    """What the probe finds in a copy of the page at a width."""
    copy = folder / f"probed-{width}.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(name=copy.name, width=width), encoding="utf-8")
    waiting = ("--virtual-time-budget=5000", "--window-size=1300,1000", "--dump-dom")
    process = chromium(folder / "profile", frame, *waiting, *options)
    assert console(process) == []
    stored = re.search(r'data-found="([^"]+)"', process.stdout)
    assert stored
    return json.loads(stored[1].replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [validation_row(0, True), *map(step_row, range(1, 6)), validation_row(5, True), event(5, "finished", "done")]
    before, after = side(0.9, [sample("p", "Sure.", "comply")]), side(0.1, [sample("p", "No.", "refuse")])
    config = "model:\n  name: tiny-model\n"
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", rows, {"before": before, "after": after}, config)
    long = "w" * 100_000
    asked = [answer("base", i, f"Find <b>willow</b> number {i}. {long}", "comply") for i in range(8)]
    asked += [answer("bent", i, "\u202eNo." if i else "Take glass.", "refuse" if i else "comply") for i in range(8)]
    content = json.loads(json.dumps(summary()).replace('"gcg"', json.dumps("gcg" + long)))
    write_eval(folder / "eval", content, asked)
    return write_report(folder)


def test_at_both_widths_and_in_both_schemes_everything_is_there_and_fits(page: Path, tmp_path: Path):
    narrow = probed(tmp_path, page, 390)
    wide = probed(tmp_path, page, 1200, "--blink-settings=preferredColorScheme=0")
    for found, width in ((narrow, 390), (wide, 1200)):
        assert found["inner"] == width
        assert found["width"] <= width
        assert len(found["pictures"]) == 5
        # Both sides of evaluation.json, then of two attacks and two kinds of questions by two judges.
        assert found["bars"] == 2 * (3 + 4 + 2 * 2 * 3 + 2 * (4 + 3))
        assert found["tables"] == 11
        assert found["smallest"] >= 9
        assert found["unreachable"] == 0
        assert found["matches"] == [8, 1, 8, 1, 0]
        assert found["output"] == "0 found"
    assert narrow["ground"] != wide["ground"]
    assert narrow["ink"] != wide["ink"]


def test_it_prints(page: Path, tmp_path: Path):
    target = tmp_path / "page.pdf"
    process = chromium(tmp_path / "profile", page, f"--print-to-pdf={target}")
    assert console(process) == []
    assert target.read_bytes().startswith(b"%PDF")
    assert target.stat().st_size > 20_000


def test_the_probe_sees_what_it_looks_for(tmp_path: Path):
    broken = tmp_path / "broken.html"
    wide = '<div style="width: 3000px">x</div><script>document.title = document.body.scrollWidth; nothing()</script>'
    broken.write_text(f"<!doctype html><body>{wide}", encoding="utf-8")
    process = chromium(tmp_path / "profile", broken, "--window-size=390,900", "--dump-dom")
    assert "nothing is not defined" in "".join(console(process))
    assert int(re.findall(r"<title>(\d+)", process.stdout)[0]) >= 3000
