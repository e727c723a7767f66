"""A comparison of two runs as a table in the terminal and as a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from attncap.analysis.compare import HEADINGS, Comparison
from attncap.extras import require
from attncap.report.terminal import new_console


def print_comparison(comparison: Comparison, level: float = 0.05, console: Any = None) -> None:
    """Print the heads that differ most.

    Args:
        level: heads are shown whose corrected p is at most this; all, where nothing was tested.
        console: the rich.console.Console to print to; a new one on stdout when None.
    """
    tables, box = require("rich.table", "report"), require("rich.box", "report")
    found = comparison.shown(level)
    console = new_console() if console is None else console
    table = tables.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if place < 2 else "right", no_wrap=True)
    for one in found:
        table.add_row(*one.cells)
    if found:
        console.print(table)
    for line in comparison.remarks(level):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write all heads to a .parquet or .csv file; its folder is made where there is none."""
    pyarrow = require("pyarrow", "report")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist([asdict(one) for one in comparison.differences])
    if path.suffix == ".csv":
        require("pyarrow.csv", "report").write_csv(table, path)
    else:
        require("pyarrow.parquet", "report").write_table(table, path, compression="zstd")
