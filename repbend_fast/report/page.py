"""Writes the page of one run or of several: one HTML file that loads nothing, and of one run its figures as SVG files
in ``plots/`` beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from repbend_fast.report.page_sections import SECTIONS, Look
from repbend_fast.report.run_record import RunRecord, read_run
from repbend_fast.report.ugly_text import clean
from repbend_fast.runs.folder import write_text

PAGE = "report.html"


def write_report(folder: Path, *others: Path, out: Path | None = None) -> Path:
    """Write the page of a run's folder, or of several beside each other, and return its path.

    Of one run it is ``report.html`` in the run's folder, with ``plots/*.svg`` beside it; of several, ``report.html``
    beside the first one's folder. ``out`` is another place for the page. Parts that a run does not have are left out,
    with a line that says so.

    Raises:
        UserError: a folder is no run's, or the page cannot be written.
    """
    runs = [read_run(Path(each)) for each in (folder, *others)]
    _tell_apart(runs)
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=clean,
    )
    look = Look(environment.get_template("parts.html.j2").module, several=len(runs) > 1)
    sections = [section for make in SECTIONS if (section := make(runs, look)) is not None]
    text = environment.get_template("page.html.j2").render(
        title=", ".join(run.label for run in runs), runs=runs, sections=sections
    )
    if not look.several:
        for name, svg in look.files.items():
            write_text(runs[0].folder / "plots" / f"{name}.svg", svg)
    target = out or (runs[0].folder if len(runs) == 1 else runs[0].folder.resolve().parent) / PAGE
    write_text(target, text)
    return target


def _tell_apart(runs: Sequence[RunRecord]) -> None:
    """Runs whose folders have one name are called by a longer piece of their paths."""
    paths = [run.folder.resolve() for run in runs]
    for run, path in zip(runs, paths, strict=True):
        length = 1
        while length < len(path.parts) and sum(p.parts[-length:] == path.parts[-length:] for p in set(paths)) > 1:
            length += 1
        run.label = "/".join(path.parts[-length:])
