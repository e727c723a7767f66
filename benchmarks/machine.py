"""What the figures were measured on, and how turns are taken."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import attncap


def describe(threads: int) -> dict[str, object]:
    """Machine and versions, with the multipliers' own speed in GFLOP/s of all threads."""
    from attncap import _C

    return {
        "processor": processor_name(),
        "threads": threads,
        "instruction set": _C.instruction_sets()[0],
        "FMA peak, one thread [GFLOP/s]": round(max(_C.fma_rate(0.2) for _ in range(5)), 1),
        "attncap": attncap.__version__,
        "kernels": _C.source_hash,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def processor_name() -> str:
    """The processor as the system names it, with its family and model numbers where it is coy about its name."""
    if sys.platform != "linux":
        return platform.processor() or platform.machine()
    found = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    name = found.get("model name", platform.machine())
    return f"{name} (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else name


def medians(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, the median of `rounds` turns (A B C A B C ...) after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
