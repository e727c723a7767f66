"""Programs of checks in C++ (tests/native), built and run once: test processes side by side share what they print."""

from __future__ import annotations

import fcntl
import os
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tests" / "native"
INCLUDES = (f"-I{ROOT / 'csrc'}", f"-I{NATIVE}")


def compiler() -> list[str]:
    """The command that setup.py compiles C++ with."""
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler {command[0]}: install g++, or name one in CXX")
    return command


def build(source: str, program: Path, options: Iterable[str] = (), like: str = "") -> None:
    """Compiles with setup.py's flags, those of a source `like` too, but for less optimisation, which takes its time."""
    pytest.importorskip("pybind11", reason="setup.py, whose flags are wanted, needs it")
    setup = runpy.run_path(str(ROOT / "setup.py"))
    flags = [*setup["COMMON_FLAGS"], "-O1", *setup["sanitizer_flags"](), *setup["flags_for"](like)]
    command = [*compiler(), *flags, *options, *INCLUDES, str(NATIVE / source), "-o", str(program)]
    subprocess.run(command, check=True)


def run(program: Path) -> str:
    """What a program prints, and how it stopped where it did not end well."""
    done = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout + (f"program stopped with status {done.returncode}\n" if done.returncode else "")


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that the test processes of one run have in common."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def outcomes(folder: Path, name: str, make: Callable[[Path], str]) -> dict[str, str]:
    """What the program `name` says of each group of checks; `make` builds it at a path and gives what it prints."""
    printed = folder / f"{name}.txt"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            printed.write_text(make(folder / name))
    return dict(line.split(" ", 1) for line in printed.read_text().splitlines())
