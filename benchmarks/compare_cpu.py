"""Time attncap on this CPU against torch's own attention and against the eager map with the same statistics.

    python -m benchmarks.compare_cpu [--threads N] [--rounds N] [--results FOLDER]

Contestants of one shape take turns (A B C A B C ...) and each figure is a median, so a machine whose speed drifts
gives the same ratios. A ratio above 1 means attncap is faster. With --results the figures are written as JSON, and as
the table that the documentation shows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases_cpu import DECODING, SHAPES, Shape, contestants, slower_peers
from benchmarks.machine import describe, medians

Figures = dict[str, float]


def measure_alone(shape: Shape, rounds: int, peak: float, threads: int) -> Figures:
    """`measure` in a process of its own: what other shapes left of the heap would change the figures."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)) as process:
        return process.submit(measure, shape, rounds, peak).result()


def measure(shape: Shape, rounds: int, peak: float) -> Figures:
    """Milliseconds of each contestant and the ratios people ask for."""
    times = medians(contestants(shape), rounds)
    everything, plain = times["everything"], times["no statistics"]
    figures = {f"{name} [ms]": 1e3 * seconds for name, seconds in times.items()}
    figures["SDPA / everything"] = times["torch SDPA"] / everything
    figures["SDPA / no statistics"] = times["torch SDPA"] / plain
    figures["everything costs [%]"] = 100 * (everything / plain - 1)
    peers = medians(slower_peers(shape), max(3, rounds // 3))
    for name, seconds in peers.items():
        if name != "everything":
            figures[f"{name} [ms]"] = 1e3 * seconds
            figures[f"{name} / attncap"] = seconds / peers["everything"]
    if peak and shape.dtype == "float32" and shape.rows is None and not shape.padded:
        figures["of FMA peak [%]"] = 100 * shape.flops / everything / 1e9 / peak
    if shape.rows is not None:
        figures["reads [GB/s]"] = shape.key_value_bytes / everything / 1e9
    return figures


def measure_avx2(rounds: int, threads: int) -> dict[str, Figures]:
    """attncap held to AVX2 against torch with everything the machine has."""
    os.environ["ATTNCAP_CPU_ISA"] = "avx2"
    try:
        shapes = [Shape(1, 8, 2048, 64), Shape(1, 8, 2048, 128)]
        return {f"{shape.name}, AVX2": measure_alone(shape, rounds, 0.0, threads) for shape in shapes}
    finally:
        del os.environ["ATTNCAP_CPU_ISA"]


def read_bandwidth() -> float:
    """GB/s at which all threads together read memory."""
    numbers = torch.ones(1 << 26)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return numbers.nbytes / best / 1e9


COLUMNS = (
    "torch SDPA [ms]",
    "no statistics [ms]",
    "default [ms]",
    "everything [ms]",
    "SDPA / everything",
    "everything costs [%]",
    "of FMA peak [%]",
    "reads [GB/s]",
    "eager + everything / attncap",
    "FlexAttention / attncap",
)


def rows_of(results: dict[str, Figures]) -> list[list[str]]:
    """The table's cells as text."""
    return [
        [name, *(f"{figures[column]:.2f}" if column in figures else "" for column in COLUMNS)]
        for name, figures in results.items()
    ]


def as_markdown(machine: dict[str, object], results: dict[str, Figures]) -> str:
    """The page of the documentation."""
    head = ["call", *COLUMNS]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows_of(results))]
    told = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    return f"""# Speed on the CPU

Made by `python -m benchmarks.compare_cpu --results benchmarks/results`. Medians of turns taken by all contestants in
one run; `everything` is `StatSpec.all()`; ratios above 1 mean that attncap is faster. Peers marked "/ attncap" take
turns with `everything`: eager attention with the same statistics from the map, and FlexAttention, which has none.

{told}

{chr(10).join(lines)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, help="folder for cpu.json and cpu.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console() if sys.stdout.isatty() else Console(width=200)
    machine = describe(arguments.threads)
    machine["memory read [GB/s]"] = round(read_bandwidth(), 1)
    peak = float(str(machine["FMA peak, one thread [GFLOP/s]"])) * arguments.threads

    results: dict[str, Figures] = {}
    for shape in (*SHAPES, *DECODING):
        console.print(shape.name)
        results[shape.name] = measure_alone(shape, arguments.rounds, peak, arguments.threads)
    if "avx2" in _sets():
        results |= measure_avx2(arguments.rounds, arguments.threads)

    table = Table(title=f"{machine['processor']}, {arguments.threads} threads")
    for column in ("call", *COLUMNS):
        table.add_column(column)
    for cells in rows_of(results):
        table.add_row(*cells)
    console.print(table)
    if arguments.results:
        arguments.results.mkdir(parents=True, exist_ok=True)
        shapes = {shape.name: asdict(shape) for shape in (*SHAPES, *DECODING)}
        record = {"machine": machine, "shapes": shapes, "results": results}
        (arguments.results / "cpu.json").write_text(json.dumps(record, indent=2) + "\n")
        (arguments.results / "cpu.md").write_text(as_markdown(machine, results))


def _sets() -> list[str]:
    from attncap import _C

    return _C.instruction_sets()


if __name__ == "__main__":
    main()
