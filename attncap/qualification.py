"""The record of where GPU kernels have been proved exact and timed, and what names the kernels it was done with.

`qualified.json` is written by the qualification run (`make qualify`) and committed. Each of its runs holds for one
implementation, one GPU and the kernel sources of one hash: kernels that have changed since are not qualified.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch

RECORD = "qualified.json"
SPEED = "TFLOP/s"  # of a run: by head dim, measured on the same calls for every implementation


@functools.cache
def triton_hash() -> str:
    """Names the sources of the Triton kernels; "" where they are not there."""
    package = importlib.util.find_spec("attncap_kernels")
    if package is None or package.origin is None:
        return ""
    digest = hashlib.sha256()
    for source in sorted(Path(package.origin).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cuda_hash() -> str:
    """Names the sources and the compiler of the CUDA kernels that are built; "" where none are."""
    try:
        from attncap import _C
    except ImportError:
        return ""
    return _C.cuda_hash


# How the sources of each implementation that can be qualified are named.
HASHES: dict[str, Callable[[], str]] = {"triton": triton_hash, "cuda": cuda_hash}


@functools.cache
def record() -> list[dict[str, Any]]:
    """The qualification runs that were committed: implementation, GPU, kernel hash, versions, speeds."""
    runs: list[dict[str, Any]] = json.loads(resources.files("attncap").joinpath(RECORD).read_text())["runs"]
    return runs


def gpu_name(index: int | None) -> str:
    """The name of a GPU (None: the current one), as runs have it."""
    return torch.cuda.get_device_name(index)


def qualified_run(impl: str, gpu: str) -> dict[str, Any] | None:
    """The run on record that holds for `impl` on this GPU, with the sources as they are."""
    runs = (run for run in record() if (run["impl"], run["gpu"]) == (impl, gpu))
    return next((run for run in runs if run["kernels"] == HASHES[impl]()), None) if impl in HASHES else None


def lacks(impl: str, gpu: str) -> str | None:
    """Why `impl` does not count as qualified on this GPU, or None."""
    if qualified_run(impl, gpu) is not None:
        return None
    if any((run["impl"], run["gpu"]) == (impl, gpu) for run in record()):
        return f"the {impl} kernels have changed since the qualification run on {gpu}"
    return f"no qualification run of the {impl} kernels on {gpu} is on record (`make qualify` makes one)"


def fastest(impls: tuple[str, ...], index: int | None) -> tuple[tuple[int, str], ...]:
    """(head dim, the fastest of `impls` that is qualified on a GPU, up to that head dim), rising; () where none is."""
    gpu = gpu_name(index)
    runs = {impl: run for impl in impls if (run := qualified_run(impl, gpu)) is not None}
    speeds = {impl: {int(dim): speed for dim, speed in run[SPEED].items()} for impl, run in runs.items()}
    dims = sorted({dim for by_dim in speeds.values() for dim in by_dim})
    return tuple((dim, max(speeds, key=lambda impl: speeds[impl].get(dim, 0.0))) for dim in dims)


# What torch.compiler.assume_constant_result sets (and loads the compiler for): a compiled call asks once.
fastest._dynamo_marked_constant = True  # type: ignore[attr-defined]
