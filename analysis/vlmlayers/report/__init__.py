"""The report a person hands to a colleague: one HTML file that opens offline, and Markdown."""

from __future__ import annotations

from vlmlayers.report.compare import write_comparison
from vlmlayers.report.figures import write_figures
from vlmlayers.report.page import write_report

__all__ = ["write_comparison", "write_figures", "write_report"]
