"""Time attncap's backward on this CPU against torch's own: the backward alone, after forwards that are not timed.

    python -m benchmarks.backward_cpu [--threads N] [--rounds N] [--results FOLDER]

Contestants of one shape take turns and each figure is a median, as in compare_cpu.py. A ratio above 1 means attncap is
faster. A backward multiplies five products; the share of the multipliers' peak is counted by these.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import attncap
from attncap import StatSpec
from benchmarks.cases_cpu import EVERYTHING, Shape
from benchmarks.machine import describe, medians

SHAPES = [Shape(1, 8, keys, 64, causal=causal) for keys in (512, 1024, 2048) for causal in (False, True)]
SHAPES += [Shape(32, 12, 128, 32), Shape(8, 12, 512, 32), Shape(1, 8, 2048, 128), Shape(1, 8, 2048, 128, causal=True)]
SHAPES += [Shape(1, 8, 2048, 64, dtype=dtype) for dtype in ("bfloat16", "float64")]
COLUMNS = (
    "torch [ms]",
    "out [ms]",
    "out, entropy [ms]",
    "everything [ms]",
    "torch / out",
    "torch, of FMA peak [%]",
    "out, of FMA peak [%]",
)


def contestants(shape: Shape) -> dict[str, Callable[[], object]]:
    """Backwards through the output, and through statistics besides."""
    leaves = [tensor.requires_grad_() for tensor in shape.tensors()]
    derivative = torch.randn(shape.batch, shape.heads, shape.keys, shape.dim).to(leaves[0].dtype)

    def backward(outputs: list[Tensor]) -> Callable[[], object]:
        given = [derivative, *(torch.randn_like(tensor) for tensor in outputs[1:])]
        return lambda: torch.autograd.grad(outputs, leaves, given, retain_graph=True)

    def after(spec: StatSpec) -> Callable[[], object]:
        out, stats = attncap.attention(*leaves, spec, causal=shape.causal)
        return backward([out, *(tensor for name, tensor in stats.items() if name not in ("lse", "topk_index"))])

    return {
        "torch": backward([F.scaled_dot_product_attention(*leaves, is_causal=shape.causal)]),
        "out": after(StatSpec.none()),
        "out, entropy": after(StatSpec(entropy=True, max=False, sink=0, diagonal=None, topk=0)),
        "everything": after(EVERYTHING),
    }


def measure(shape: Shape, rounds: int, peak: float) -> dict[str, float]:
    """Milliseconds of each contestant, the ratio, and shares of the peak where it is that of the dtype."""
    times = medians(contestants(shape), rounds)
    figures = {f"{name} [ms]": 1e3 * seconds for name, seconds in times.items()}
    figures["torch / out"] = times["torch"] / times["out"]
    if shape.dtype == "float32":
        for name in ("torch", "out"):
            figures[f"{name}, of FMA peak [%]"] = 100 * 2.5 * shape.flops / times[name] / 1e9 / peak
    return figures


def as_markdown(machine: dict[str, object], results: dict[str, dict[str, float]]) -> str:
    """The figures as a page."""
    rows = [["call", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for name, figures in results.items():
        rows.append([name, *(f"{figures[column]:.2f}" if column in figures else "" for column in COLUMNS)])
    told = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    return f"""# Speed of the backward on the CPU

Made by `python -m benchmarks.backward_cpu --results benchmarks/results`: the backward alone, of the output (`out`), of
output and entropy, and of all statistics of `StatSpec.all()`. Medians of turns taken in one run; ratios above 1 mean
that attncap is faster.

{told}

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, help="folder for cpu_backward.json and cpu_backward.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = describe(arguments.threads)
    machine["load of the machine"] = round(os.getloadavg()[0], 1)
    peak = float(str(machine["FMA peak, one thread [GFLOP/s]"])) * arguments.threads
    results = {shape.name: measure(shape, arguments.rounds, peak) for shape in SHAPES}
    page = as_markdown(machine, results)
    print(page)
    if arguments.results:
        arguments.results.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine, "results": results}
        (arguments.results / "cpu_backward.json").write_text(json.dumps(record, indent=2) + "\n")
        (arguments.results / "cpu_backward.md").write_text(page)


if __name__ == "__main__":
    main()
