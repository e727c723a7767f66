"""`write_report`: runs as one HTML file that needs nothing else, no network either.

The page draws its maps itself, as tables: they are walked with the arrow keys, read aloud and printed, and the file is
a few hundred kilobytes. A plotting library alone would be 4.5 MB of script, and its pictures are for the eye only.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attncap.analysis.catalogue import ANALYSES
from attncap.analysis.results import Result, read_results
from attncap.extras import require
from attncap.parts import write_whole
from attncap.report.content import build_report
from attncap.report.data import RunContent, page_data
from attncap.report.details import read_details
from attncap.report.differences import Differences, build_differences, check_alike
from attncap.store import Run, read_run
from attncap.types import AttncapError

SHOWN_PER_ROLE = 3
"""Heads listed for each role, where so many have it; never fewer than one."""

_SCRIPTS = ("base.js", "grid.js", "maps.js", "head.js", "sections.js", "main.js")

_HEAD = re.compile(r"[Ll]ayer (\d+) head (\d+)")

RunPath = str | os.PathLike[str]


class ReportError(AttncapError, OSError):
    """The file of a report cannot be written; the message says why."""


class ReportPathError(ReportError, ValueError):
    """The file given for a report is a folder."""


def write_report(run_paths: RunPath | Sequence[RunPath], output_path: RunPath) -> Path:
    """Write one run, or several to compare with the first of them, as one self-contained HTML file.

    The file is written whole or not at all; one that is there is replaced. Gives the path written.

    Args:
        run_paths: folder of a finished run, or several.

    Raises:
        RunError: a folder holds no finished run, or something in it is damaged.
        RunMismatchError: the runs have other layers and heads, or one is given twice.
        MissingExtraError: jinja2 or pyarrow is not installed; the message names the extra.
        ReportError: the file cannot be written.
    """
    jinja2 = require("jinja2", "report")  # looked up first: nothing is computed for a page that cannot be drawn
    contents, comparisons = read_contents(run_paths)
    page = render(contents, comparisons, jinja2)
    output = Path(output_path)
    if output.is_dir():
        raise ReportPathError(f"{output}: is a folder; give a file for the report with -o")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, page.encode("utf-8", "backslashreplace"))  # a name may be no UTF-8
    except OSError as error:
        reason = error.strerror or str(error)
        raise ReportError(f"{output}: the report cannot be written ({reason}); give another file with -o") from error
    return output


def read_contents(run_paths: RunPath | Sequence[RunPath]) -> tuple[tuple[RunContent, ...], tuple[Differences, ...]]:
    """(what the runs say, what the first and each other differ in); raises as `write_report` does."""
    paths = [run_paths] if isinstance(run_paths, (str, os.PathLike)) else list(run_paths)
    if not paths:
        raise ValueError("run_paths: expected at least one run, got none")
    runs = tuple(read_run(path) for path in paths)
    check_alike(runs)
    reports = [build_report(run) for run in runs]
    labels = _labels(runs)
    comparisons = tuple(
        build_differences(runs[0], run, reports[0], (labels[0], label))
        for run, label in zip(runs[1:], labels[1:], strict=True)
    )
    contents = tuple(
        RunContent(label, report, read_details(run, report), _results(run))
        for label, run, report in zip(labels, runs, reports, strict=True)
    )
    return contents, comparisons


def render(contents: Sequence[RunContent], comparisons: Sequence[Differences], jinja2: Any) -> str:
    """The page."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["linked"] = _linked
    script = '(function () {\n"use strict";\n' + "".join(_asset(name) for name in _SCRIPTS) + "})();\n"
    page: str = environment.from_string(_asset("report.html.j2")).render(
        runs=contents,
        report=contents[0].report,
        comparisons=comparisons,
        data=page_data(contents, comparisons),
        shown=SHOWN_PER_ROLE,
        # These two are ours, not the user's; nothing else is marked as safe.
        style=_trusted(_asset("report.css")),
        script=_trusted(script),
    )
    return page


def _results(run: Run) -> tuple[Result, ...]:
    """What analyses left in a run, in the order they are computed in; what else is there, after that by name."""
    order = [name for analysis in ANALYSES for name in analysis.writes]
    found = read_results(run.path)
    return tuple(found[name] for name in sorted(found, key=lambda name: [*order, name].index(name)))


def _labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: its folder's, the whole path where two folders have one name."""
    names = [run.path.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def _linked(sentence: str, number: int, content: RunContent) -> Any:
    """A sentence in which "layer 0 head 2" leads to the page of that head, where there is one such head."""
    markup = require("markupsafe", "report")
    rows: dict[int, list[int]] = {}
    for row, layer in enumerate(content.report.layers):
        rows.setdefault(layer.number, []).append(row)

    def link(found: re.Match[str]) -> str:
        layer, head = int(found[1]), int(found[2])
        places = rows.get(layer, [])
        return f'<a href="#head-{number}-{places[0]}-{head}">{found[0]}</a>' if len(places) == 1 else found[0]

    return markup.Markup(_HEAD.sub(link, str(markup.escape(sentence))))


def _trusted(text: str) -> Any:
    """Text that stands in a <style> or <script> as it is; one that would end the element is refused."""
    if "</script" in text.lower() or "</style" in text.lower():
        raise ValueError("text: expected no closing tag inside a script or style sheet")
    return require("markupsafe", "report").Markup(text)


def _asset(name: str) -> str:
    return importlib.resources.files("attncap.report").joinpath("templates").joinpath(name).read_text(encoding="utf-8")
