"""Compile the kernels for GPUs that are not here, and print what their machine code holds.

    python -m benchmarks.gate                               the whole table
    python -m benchmarks.gate --arch sm_90 --dim 128        a part of it
    python -m benchmarks.gate --update                      the figures found become the budgets of what was compiled

Exits with 1 where a rule is broken that budgets.json does not name, or a budget is exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.gate import budgets
from benchmarks.gate.compiling import Table, compile_groups
from benchmarks.gate.entries import ARCHS, DIMS, DTYPES, STATISTICS, Group


def main() -> int:
    arguments = _parser().parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels would compile nothing; the processes inherit this
    groups = [
        Group(arch, dtype, dim) for dim in sorted(arguments.dim, reverse=True) for dtype in arguments.dtype
        for arch in arguments.arch
    ]  # fmt: skip
    table: Table = {}
    work = {group: group.among(arguments.statistics) for group in groups}
    for number, (group, part) in enumerate(compile_groups(work, arguments.processes), 1):
        print(f"[{number}/{len(groups)}] {group.name('')}", file=sys.stderr, flush=True)
        table |= part
    table = {group.name(name): table[group.name(name)] for group in groups for name in work[group]}
    if arguments.json:
        found = {entry: {name: asdict(one) for name, one in kernels.items()} for entry, kernels in table.items()}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    _print(table)
    if arguments.update:
        _update(table)
    committed = budgets.load()
    broken = budgets.broken_rules(table)
    return not budgets.passes(broken, budgets.exceeded(table, committed.table), committed.known)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--dim", nargs="+", type=int, choices=DIMS, default=DIMS)
    parser.add_argument("--statistics", nargs="+", choices=STATISTICS, default=STATISTICS)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--update", action="store_true", help="make the figures found the committed budgets")
    return parser


def _update(table: Table) -> None:
    import triton

    from attncap import qualification

    old = budgets.load().table if budgets.PATH.exists() else {}
    merged = old | table
    known = tuple(sorted(budgets.broken_rules(merged)))
    budgets.save(budgets.Budgets(triton.__version__, qualification.triton_hash(), merged, known))


def _print(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as Grid

    columns = ("registers", "spills", "stack", "shared", "warps", "stages", "matrix", "copies", "per_element")
    grid = Grid(title="per_element: instructions of the main loop for each score")
    for column in ("entry", "kernel", *columns):
        grid.add_column(column)
    for entry, kernels in table.items():
        for kernel, figures in kernels.items():
            values = asdict(figures)
            cells = ["" if values[column] is None else str(values[column]) for column in columns]
            grid.add_row(entry, kernel, *cells, style="red" if figures.spills else None)
    Console(width=None if sys.stdout.isatty() else 180).print(grid)


if __name__ == "__main__":
    sys.exit(main())
