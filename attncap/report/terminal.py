"""`print_highlights`: the most telling heads of a run as a table in the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from attncap.analysis.roles import RoleResult
from attncap.extras import require
from attncap.report.content import Layer, build_report
from attncap.store import read_run

SHOWN_PER_ROLE = 2
"""Heads listed for each role, where so many have it; never fewer than one."""

# A file or a pipe has no width of its own: one at which no line is broken.
_WIDTH_OF_A_FILE = 400


def print_highlights(run_path: str | os.PathLike[str], console: Any = None) -> None:
    """Print the most telling heads of the run in the folder `run_path`.

    Args:
        run_path: a finished run.
        console: the rich.console.Console to print to; a new one on stdout when None.

    Raises:
        RunError: the folder holds no finished run.
        MissingExtraError: rich or pyarrow is not installed; the message names the extra.
    """
    tables, texts, box = (require(f"rich.{name}", "report") for name in ("table", "text", "box"))
    report = build_report(read_run(run_path))
    console = new_console() if console is None else console
    # Names of models and tags are the user's: Text keeps rich from reading markup in them.
    title = texts.Text(f"{report.model} over {report.corpus}: the most telling heads", style="bold")
    table = tables.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, options in _COLUMNS:
        table.add_column(heading, **options)
    for result in report.roles:
        _add_role(table, result, texts.Text)
    console.print(title)  # not as the table's own, which breaks it at the table's width
    console.print(table)
    if not report.roles:
        console.print(texts.Text(_why_empty(report.layers)))


def new_console() -> Any:
    """A rich.console.Console on stdout, wide enough for whole lines where that is no terminal."""
    consoles = require("rich.console", "report")
    console = consoles.Console()
    return console if console.is_terminal else consoles.Console(width=_WIDTH_OF_A_FILE)


def _why_empty(layers: Sequence[Layer]) -> str:
    if not layers:
        return "No head to show: the run holds no statistic of any head."
    return (
        "No head to show: none of the captured statistics is a role's, or no row of them was counted (a corpus without "
        "text, or numbers that are not finite: try --dtype float32)."
    )


_COLUMNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("role", {"no_wrap": True}),
    ("head", {"no_wrap": True}),
    ("mean", {"no_wrap": True, "justify": "right"}),
    ("threshold", {"no_wrap": True}),
    ("what is measured", {"overflow": "fold"}),
)


def _add_role(table: Any, result: RoleResult, text: Any) -> None:
    role, holders = result.role, result.holders
    listed = (holders or result.ranked[:1])[:SHOWN_PER_ROLE] if role.rule else result.ranked[:SHOWN_PER_ROLE]
    more = f" ({len(holders)} heads)" if len(holders) > SHOWN_PER_ROLE else ""
    for place, head in enumerate(listed):
        passed = head.holds or not role.rule
        table.add_row(
            text(role.name + more if place == 0 else "", style="bold" if passed else "dim"),
            text(head.label, style="" if passed else "dim"),
            text(role.shown(head.mean), style="green" if head.holds else "dim" if role.rule else ""),
            text(f"{role.rule}{'' if head.holds else ', not passed'}" if role.rule else "", style="dim"),
            text(role.measures if place == 0 else "", style="dim"),
        )
