"""The CUDA kernels built for the model of a GPU in tests/native, as a Python module like attncap._C.

    native = cuda_model.build(folder)                    compiles what has changed in the folder since
    out, stats = cuda_model.attention(case, native)      runs a call as impl="cuda" would on a GPU
"""

from __future__ import annotations

import fcntl
import importlib.util
import runpy
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attncap import HeadStats, cuda, ops, validation
from attncap.validation import Call
from tests.cases import Case

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tests" / "native"
NAME = "cuda_model"
# A kernel is tested for its meaning, so a model of it may be slow; without any optimisation it would be too slow.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas")


def compiler() -> list[str]:
    """The command that setup.py compiles C++ with."""
    import os

    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")


def build(folder: Path) -> ModuleType:
    """The module, compiled in `folder`, which processes and sessions may share."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = _linked(folder)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _linked(folder: Path) -> Path:
    import pybind11

    setup = runpy.run_path(str(ROOT / "setup.py"))
    includes = [ROOT / "csrc", NATIVE, pybind11.get_include(), sysconfig.get_paths()["include"]]
    sources = [NATIVE / f"{NAME}.cpp", *(ROOT / "csrc" / "bindings" / f"{part}.cpp" for part in ("problem", "cuda"))]
    sources += sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    objects = []
    for source in sources:
        made = folder / f"{source.stem}{source.suffix}.o"
        command = [*compiler(), *FLAGS, *(f"-I{include}" for include in includes)]
        setup["compile_stale"]([*command, "-x", "c++", "-c", str(source), "-o", str(made)], made)
        objects.append(made)
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists() or any(library.stat().st_mtime < made.stat().st_mtime for made in objects):
        subprocess.run([*compiler(), "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library
