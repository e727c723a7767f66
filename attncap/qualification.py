"""The record of where GPU kernels have been proved exact and timed, and what names the kernels it was done with.

`qualified.json` is written by the qualification run (benchmarks/qualify) and committed: for each implementation and
GPU, the hash of the kernel sources, the versions, and what was measured.
"""

from __future__ import annotations

import functools
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch

RECORD = "qualified.json"


@functools.cache
def triton_hash() -> str:
    """Names the sources of the Triton kernels."""
    import attncap_kernels

    digest = hashlib.sha256()
    for source in sorted(Path(attncap_kernels.__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def record() -> list[dict[str, Any]]:
    """The qualification runs that were committed: implementation, GPU, kernel hash, versions, result."""
    entries: list[dict[str, Any]] = json.loads(resources.files("attncap").joinpath(RECORD).read_text())["runs"]
    return entries


def lacks(impl: str, device: torch.device) -> str | None:
    """Why `impl` does not count as qualified on this GPU, or None."""
    gpu = torch.cuda.get_device_name(device)
    here = [run for run in record() if run["impl"] == impl and run["gpu"] == gpu]
    if not here:
        return f"no qualification run on {gpu} is on record (`make qualify` makes one)"
    if all(run["kernels"] != triton_hash() for run in here):
        return f"the kernels have changed since the qualification run on {gpu}"
    return None
