"""Time and memory over the length of the sequence: attncap and the eager map, both with the same statistics.

    python -m benchmarks.growth_cpu [--results FOLDER]

Each point runs in a process of its own, whose peak memory beyond the inputs is what is told. Writes growth_cpu.json
and growth_cpu.svg.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.machine import describe

HEADS, DIM = 8, 64
LENGTHS = {"attncap": [256, 512, 1024, 2048, 4096, 8192, 16384], "eager": [256, 512, 1024, 2048, 4096]}

PROGRAM = """
import time, torch
import attncap
from benchmarks import eager

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

spec = attncap.StatSpec.all()
run = {{"attncap": attncap.attention, "eager": eager.attention_with_statistics}}["{who}"]
small = torch.randn(3, 1, {heads}, 64, {dim})
run(*small, spec)
tensors = torch.randn(3, 1, {heads}, {length}, {dim})
open("/proc/self/clear_refs", "w").write("5")
before = peak()
run(*tensors, spec)
memory = peak() - before
start = time.perf_counter()
run(*tensors, spec)
print(time.perf_counter() - start, memory)
"""


def measure(who: str, length: int) -> dict[str, float]:
    """Seconds and MiB of one call."""
    program = PROGRAM.format(who=who, heads=HEADS, dim=DIM, length=length)
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    seconds, memory = map(float, output.split())
    return {"length": length, "seconds": seconds, "memory_mib": memory}


def draw(points: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Both quantities over the length, on logarithmic axes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "attncap"  # equal pictures are equal files
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, quantity, label in zip(
        axes, ("seconds", "memory_mib"), ("seconds", "MiB beyond the inputs"), strict=True
    ):
        for who, line in points.items():
            axis.plot([p["length"] for p in line], [max(p[quantity], 1e-4) for p in line], marker="o", label=who)
        axis.set(xscale="log", yscale="log", xlabel="sequence length", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(f"Attention with every statistic, {HEADS} heads of {DIM}, float32, CPU", fontsize=11)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    folder: Path = parser.parse_args().results
    points = {who: [measure(who, length) for length in lengths] for who, lengths in LENGTHS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": describe(torch.get_num_threads()), "points": points}
    (folder / "growth_cpu.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(points, folder / "growth_cpu.svg")
    for who, line in points.items():
        for point in line:
            print(f"{who} N {point['length']}: {point['seconds']:.3f} s, {point['memory_mib']:.1f} MiB")


if __name__ == "__main__":
    main()
