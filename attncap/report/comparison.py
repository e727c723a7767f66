"""A comparison of two runs as a table in the terminal and as a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from attncap.analysis.compare import Comparison, HeadDifference
from attncap.extras import require
from attncap.progress import plural
from attncap.report.terminal import new_console

_SHOWN = 20
_HEADINGS = ("statistic", "head", "mean A", "mean B", "effect (g)", "corrected p")


def print_comparison(comparison: Comparison, level: float = 0.05, console: Any = None) -> None:
    """Print the heads that differ most.

    Args:
        level: heads are shown whose corrected p is at most this; all, where nothing was tested.
        console: the rich.console.Console to print to; a new one on stdout when None.
    """
    tables, box = require("rich.table", "report"), require("rich.box", "report")
    tested = not comparison.why_untested
    found = comparison.found(level) if tested else sorted(comparison.differences, key=lambda one: -abs(one.effect))
    console = new_console() if console is None else console
    table = tables.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if place < 2 else "right", no_wrap=True)
    for one in found[:_SHOWN]:
        table.add_row(*_cells(one))
    if found:
        console.print(table)
    for line in _remarks(comparison, found, level):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cells(one: HeadDifference) -> list[str]:
    p = "not tested" if one.p_corrected is None else f"{one.p_corrected:.4f}"
    call = f" call {one.call}" if one.call else ""
    head = f"layer {one.layer} head {one.head}{call}"
    return [one.stat, head, f"{one.mean_a:.4f}", f"{one.mean_b:.4f}", f"{one.effect:+.2f}", p]


def _remarks(comparison: Comparison, found: list[HeadDifference], level: float) -> list[str]:
    if comparison.why_untested:
        return [f"Nothing was tested: {comparison.why_untested}"]
    shown = f", the {_SHOWN} largest are shown" if len(found) > _SHOWN else ""
    what = f"{comparison.documents_a:,} and {plural(comparison.documents_b, 'document')}"
    if comparison.paired:
        what = f"the same {plural(comparison.documents_a, 'document')} twice"
    return [
        f"{len(found):,} of {len(comparison.differences):,} heads and statistics differ at {level:g}{shown}: {what}; "
        "p by permutation of documents, corrected for all heads of a statistic (Westfall and Young)."
    ]


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write all heads to a .parquet or .csv file."""
    pyarrow = require("pyarrow", "report")
    table = pyarrow.Table.from_pylist([asdict(one) for one in comparison.differences])
    if path.suffix == ".csv":
        require("pyarrow.csv", "report").write_csv(table, path)
    else:
        require("pyarrow.parquet", "report").write_table(table, path, compression="zstd")
