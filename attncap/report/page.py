"""`write_report`: a run as one HTML file that needs nothing else, no network either."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attncap.extras import require
from attncap.parts import write_whole
from attncap.report.colours import DARK, LIGHT
from attncap.report.content import MEASURES, HeatMap, Report, build_report
from attncap.store import read_run
from attncap.types import AttncapError

SHOWN_PER_ROLE = 3
"""Heads listed for each role, where so many have it; never fewer than one."""


class ReportError(AttncapError, OSError):
    """The file of a report cannot be written; the message says why."""


class ReportPathError(ReportError, ValueError):
    """The file given for a report is a folder."""


def write_report(run_path: str | os.PathLike[str], output_path: str | os.PathLike[str]) -> Path:
    """Write the run in the folder `run_path` as one self-contained HTML file.

    The file is written whole or not at all; one that is there is replaced. Gives the path written.

    Raises:
        RunError: the folder holds no finished run.
        MissingExtraError: jinja2, plotly or pyarrow is not installed; the message names the extra.
        ReportError: the file cannot be written.
    """
    # Looked up first, so that nothing is computed for a page that cannot be drawn.
    plotly, jinja2 = require("plotly.offline", "report"), require("jinja2", "report")
    report = build_report(read_run(run_path))
    page = render(report, plotly.get_plotlyjs(), jinja2)
    output = Path(output_path)
    if output.is_dir():
        raise ReportPathError(f"{output}: is a folder; give a file for the report with -o")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, page.encode())
    except OSError as error:
        reason = error.strerror or str(error)
        raise ReportError(f"{output}: the report cannot be written ({reason}); give another file with -o") from error
    return output


def render(report: Report, plotly_js: str, jinja2: Any) -> str:
    """The page of a report."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_asset("report.html.j2"))
    page: str = template.render(
        report=report,
        data=_chart_data(report),
        shown=SHOWN_PER_ROLE,
        # These three are ours, not the user's; nothing else is marked as safe.
        style=_trusted(_asset("report.css")),
        script=_trusted(_asset("report.js")),
        plotly_js=_trusted(plotly_js),
    )
    return page


def _trusted(text: str) -> Any:
    """Text that stands in a <style> or <script> as it is; one that would end the element is refused."""
    if "</script" in text.lower() or "</style" in text.lower():
        raise ValueError("text: expected no closing tag inside a script or style sheet")
    return require("markupsafe", "report").Markup(text)


def _chart_data(report: Report) -> dict[str, Any]:
    """What the script draws; the template turns it into JSON."""
    return {
        "layers": [{"number": layer.number, "module": layer.module} for layer in report.layers],
        "heads": report.heads,
        "measures": MEASURES,
        "maps": [_map_data(one) for one in report.maps],
        "groups": report.groups,
        "colours": {"light": LIGHT, "dark": DARK},
    }


def _map_data(one: HeatMap) -> Mapping[str, Any]:
    return {
        "stat": one.stat,
        "group": one.group,
        "title": one.statistic.title,
        "unit": one.statistic.unit,
        "explanation": one.statistic.explanation,
        "fromZero": one.statistic.from_zero,
        "measure": one.statistic.measure,
        "threshold": one.threshold,
        "grids": dict(one.grids),
    }


def _asset(name: str) -> str:
    return importlib.resources.files("attncap.report").joinpath("templates").joinpath(name).read_text(encoding="utf-8")
