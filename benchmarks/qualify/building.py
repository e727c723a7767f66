"""Builds the CUDA kernels that are qualified, of the sources as they are, with headers carried along if need be."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.qualify.place import PROJECT

CARRIED = PROJECT / "build" / "carry"  # see building/carry.py


def build() -> str | None:
    """Build attncap._C in place, what is up to date excepted. What keeps it from being built, or None."""
    environment = os.environ | {"ATTNCAP_CUDA": "1", "ATTNCAP_BUILD_JOBS": str(os.cpu_count() or 1)}
    if (CARRIED / "include").is_dir():
        environment.setdefault("ATTNCAP_CUTLASS", str(CARRIED / "include"))
    if (CARRIED / "python").is_dir():
        # After what is installed: a package that is there fits its Python.
        environment["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(CARRIED / "python")])
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment, check=False)
    if done.returncode == 0:
        return None
    said = (done.stdout + done.stderr).strip()
    print(said, file=sys.stderr)
    return said.rpartition("\n")[2]
