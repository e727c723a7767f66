"""Puts together what a build takes besides compilers, for a machine without a network.

    python -m building.carry FOLDER

FOLDER/include has the headers for nvcc, which ATTNCAP_CUTLASS is to name there, and FOLDER/python the packages that
setup.py imports, for PYTHONPATH. `make qualify` looks for both in build/carry.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

from building.nvcc import find_headers

HEADERS = ("cute", "cutlass")
PACKAGES = ("pybind11", "setuptools")


def carry(folder: Path) -> None:
    """Fill the folder.

    Raises:
        SystemExit: something is not here either.
    """
    headers = find_headers()
    if headers is None:
        raise SystemExit("carry: CuTe's headers are not here; pip install --no-deps nvidia-cutlass")
    for name in HEADERS:
        _copy(headers / name, folder / "include" / name)
    for name in PACKAGES:
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:
            raise SystemExit(f"carry: {name} is not installed in {sys.executable}")
        _copy(Path(package.origin).parent, folder / "python" / name)


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "tests", "*.exe"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    carry(Path(sys.argv[1]))
