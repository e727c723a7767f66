"""A finished run made visible: a self-contained HTML page, figures for papers, and a table in the terminal."""

from __future__ import annotations

from attncap.report.figures import write_figures
from attncap.report.page import write_report
from attncap.report.terminal import print_highlights

__all__ = ["print_highlights", "write_figures", "write_report"]
