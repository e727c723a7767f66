"""The CUDA kernels built for the model of a GPU in tests/native, as a Python module like attncap._C.

The fixture `cuda_model` gives it to tests: attention(..., impl="cuda") runs on it then, on tensors of the CPU.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from attncap import HeadStats, cuda, dispatch
from attncap.validation import Call
from building.stale import compile_stale
from tests import programs

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tests" / "native"
FOLDER = ROOT / "build" / "cuda_model"  # what has not changed since the last session is not compiled again
NAME = "cuda_model"
# With less optimisation the tests would take longer by what the compiler saves.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


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

    includes = [ROOT / "csrc", NATIVE, pybind11.get_include(), sysconfig.get_paths()["include"]]
    compiling = [*programs.compiler(), *FLAGS, *(f"-I{include}" for include in includes)]
    sources = [NATIVE / f"{NAME}.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    objects = {folder / f"{source.name}.o": source for source in sources}

    def compile_object(made: Path) -> None:
        command = [*compiling, "-x", "c++", "-c", str(objects[made]), "-o", str(made)]
        compile_stale(made, command, functools.partial(subprocess.run, check=True))

    # Test processes wait for one another here, so that there are cores to spare.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_object, objects))
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists() or any(library.stat().st_mtime < made.stat().st_mtime for made in objects):
        library.unlink(missing_ok=True)  # a process may have it open, whose pages must stay as they are
        subprocess.run([*programs.compiler(), "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library


def install(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let impl="cuda" serve tensors on the CPU by `native`. What it fills holds nothing that could pass for results."""
    run = cuda.attention

    def attention(call: Call, out: Tensor, stats: HeadStats) -> None:
        poison(out, stats)
        run(call, out, stats, native=native)

    monkeypatch.setattr(cuda, "attention", attention)
    monkeypatch.setattr(cuda, "_lacks_of_device", lambda _device: None)
    monkeypatch.setattr(dispatch, "_cuda_availability", lambda: "yes")


def poison(out: Tensor, stats: HeadStats) -> None:
    """Outputs as a launcher is given them: received_mass is zero, the others anything."""
    out.fill_(torch.nan)
    for name, tensor in stats.items():
        if name != "received_mass":
            tensor.fill_(-7 if name == "topk_index" else torch.nan)
