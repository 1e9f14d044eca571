"""The report of one run or of several: one HTML file that loads nothing, and a run's figures as SVG files beside it."""

from repbend_fast.report.page import write_report

__all__ = ["write_report"]
