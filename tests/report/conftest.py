"""What the tests of the report share."""

from __future__ import annotations

import pytest

from repbend_fast.report.plots import FIGURES


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them is most of the time, and most tests look at the text."""
    for name in FIGURES:
        monkeypatch.setitem(FIGURES, name, lambda *runs, narrow: None)
