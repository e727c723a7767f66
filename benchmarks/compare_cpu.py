"""Time attncap on this CPU against torch's own attention and against the eager map with the same statistics.

    python benchmarks/compare_cpu.py [--threads N] [--rounds N] [--json FILE]

Contestants of one shape take turns (A B C A B C ...) and each figure is a median, so a machine whose speed drifts
gives the same ratios. A ratio above 1 means attncap is faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import attncap
from attncap import StatSpec
from benchmarks import eager


@dataclass(frozen=True)
class Shape:
    """One call: batch, heads, rows = keys, head dim."""

    batch: int
    heads: int
    length: int
    dim: int
    causal: bool = False
    dtype: str = "float32"
    eager: bool = True  # the map fits the memory


SHAPES = [
    Shape(1, 8, 2048, 64),
    Shape(1, 8, 2048, 64, causal=True),
    Shape(1, 8, 2048, 128),
    Shape(1, 8, 512, 64),
    Shape(4, 12, 2048, 32, eager=False),
    Shape(8, 12, 512, 32),
    Shape(32, 12, 128, 32),
    Shape(1, 8, 2048, 64, dtype="bfloat16"),
    Shape(1, 2, 16384, 64, causal=True, eager=False),
]
EVERYTHING = StatSpec.all()


def medians(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, median of `rounds` turns after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(shape: Shape, rounds: int) -> dict[str, float]:
    """Milliseconds of each contestant and the ratios people ask for."""
    torch.manual_seed(0)
    size = (shape.batch, shape.heads, shape.length, shape.dim)
    query, key, value = torch.randn(3, *size).to(getattr(torch, shape.dtype))
    causal = shape.causal
    contestants: dict[str, Callable[[], object]] = {
        "torch SDPA": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal),
        "attncap, no statistics": lambda: attncap.attention(query, key, value, StatSpec.none(), causal=causal),
        "attncap, default": lambda: attncap.attention(query, key, value, causal=causal),
        "attncap, everything": lambda: attncap.attention(query, key, value, EVERYTHING, causal=causal),
    }
    if shape.eager:
        contestants["eager + statistics"] = lambda: eager.attention_with_statistics(
            query, key, value, EVERYTHING, causal=causal
        )
    times = medians(contestants, rounds)
    everything = times["attncap, everything"]
    result = {f"{name} [ms]": 1e3 * seconds for name, seconds in times.items()}
    result["SDPA / everything"] = times["torch SDPA"] / everything
    result["cost of everything"] = everything / times["attncap, no statistics"] - 1
    if shape.eager:
        result["eager + statistics / everything"] = times["eager + statistics"] / everything
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from attncap import _C

    machine = {
        "processor": processor_name(),
        "instruction set": _C.instruction_sets()[0],
        "threads": arguments.threads,
        "torch": torch.__version__,
        "attncap": attncap.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    results = []
    for shape in SHAPES:
        figures = measure(shape, arguments.rounds)
        results.append({"shape": asdict(shape), "figures": figures})
        kind = f"{shape.dtype} B{shape.batch} H{shape.heads} N{shape.length} D{shape.dim}{' causal' * shape.causal}"
        print(kind, " | ".join(f"{name} {value:.2f}" for name, value in figures.items()), sep=": ", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


def processor_name() -> str:
    """The processor as the system names it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
