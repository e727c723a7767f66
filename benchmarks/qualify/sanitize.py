"""compute-sanitizer over small calls: no access outside of tensors, no races, nothing read unwritten."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.qualify import sanitized
from benchmarks.qualify.place import PROJECT, Place
from benchmarks.qualify.pool import spread

TOOLS = ("memcheck", "racecheck", "initcheck")
SECONDS = 70  # for each tool, all at the same time


def run(place: Place) -> dict[str, Any]:
    """Errors that each tool counts; `missing` where the tools are not on this machine, which is no failure."""
    program = _program()
    if place.dry or program is None:
        why = "nothing runs on a GPU here" if place.dry else "compute-sanitizer is neither on PATH nor in CUDA_HOME"
        return {"passed": True, "missing": why}
    spread(place, sanitized.call, sanitized.calls(place))  # compiles the kernels, which the tools would slow down
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        found = dict(zip(TOOLS, pool.map(lambda tool: _errors(program, tool, place.impl), TOOLS), strict=True))
    return {"passed": all(one["errors"] == 0 for one in found.values()), "tools": found}


def _program() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    inside = [str(home / folder) for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(inside))


def _errors(program: str, tool: str, impl: str) -> dict[str, Any]:
    """{errors: None where the tool gave no summary, log: the end of what it said where there are any}."""
    # Without torch's caching every tensor is an allocation of its own, whose end the tool knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, sys.executable, "-m", "benchmarks.qualify.sanitized", impl]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"errors": None, "log": f"not done after {SECONDS} s"}
    log = done.stdout + done.stderr
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", log)
    errors = int(summary[1]) if summary and done.returncode == 0 else None
    return {"errors": errors} if errors == 0 else {"errors": errors, "log": log[-4000:]}
