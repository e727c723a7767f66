"""Finds the CUDA compiler and CuTe's headers, and says what is missing.

Environment:
    ATTNCAP_CUDA         0 never builds CUDA kernels, 1 insists on them; by default they are built where nvcc is found.
    ATTNCAP_CUDA_ARCHS   architectures, separated by commas (sm_80,sm_90a).
    ATTNCAP_CUTLASS      folder of the headers of CUTLASS and CuTe, where the package nvidia-cutlass is not installed.
    CUDA_HOME            where the CUDA toolkit is, if nvcc is not on PATH.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HEADERS_PACKAGE = "nvidia-cutlass"
HEADERS_REQUIREMENT = f"{HEADERS_PACKAGE}>=4.2"
ARCHS = "sm_80,sm_90a"
OLDEST = (12, 5)  # of nvcc: the oldest whose runtime finds the driver's functions by version
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler and the headers that the kernels need besides its own."""

    nvcc: str
    version: str
    headers: Path
    archs: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"nvcc {self.version} for {', '.join(self.archs)}"

    def command(self, source: str, target: str, options: Iterable[str]) -> list[str]:
        """What compiles a source; `options` are -I and -D."""
        # The forward runs on Hopper alone: nothing of it is compiled for what else there is.
        hopper = tuple(arch for arch in self.archs if arch.startswith("sm_90")) or self.archs
        wanted = hopper if Path(source).stem.startswith("forward") else self.archs
        archs = (f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in wanted)
        system = ("-isystem", str(self.headers))
        return [self.nvcc, *FLAGS, *archs, *options, *system, "-c", source, "-o", target]

    def link_flags(self) -> list[str]:
        """The static runtime, which brings no library that a machine without CUDA lacks."""
        done = subprocess.run(
            [self.nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True
        )
        found = re.search(r"^#\$ LIBRARIES=(.*)$", done.stderr, re.MULTILINE)
        folders = [] if found is None else [folder for folder in shlex.split(found[1]) if folder.startswith("-L")]
        return [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


@functools.cache
def toolkit() -> Toolkit | str:
    """What compiles the CUDA kernels, or why they are not built.

    Raises:
        SystemExit: ATTNCAP_CUDA has no meaning, or insists on what is missing.
    """
    wish = os.environ.get("ATTNCAP_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"ATTNCAP_CUDA: expected 0 or 1, got {wish!r}")
    found = _found(wish)
    if wish == "1" and isinstance(found, str):
        raise SystemExit(f"ATTNCAP_CUDA=1: {found}")
    return found


def _found(wish: str) -> Toolkit | str:
    if wish == "0":
        return "it was built with ATTNCAP_CUDA=0"
    if os.environ.get("ATTNCAP_SANITIZE"):
        return "it was built with ATTNCAP_SANITIZE, whose sanitizers know of no GPU"
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc was found neither on PATH nor in CUDA_HOME when it was built"
    version = _version(nvcc)
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"it takes nvcc {'.'.join(map(str, OLDEST))} or newer, and it was built beside nvcc {version}"
    headers = find_headers()
    if headers is None:
        return (
            f"CuTe's headers were not found when it was built: pip install --no-deps {HEADERS_PACKAGE}, or name their "
            "folder in ATTNCAP_CUTLASS, and build it again"
        )
    return Toolkit(nvcc, version, headers, tuple(os.environ.get("ATTNCAP_CUDA_ARCHS", ARCHS).split(",")))


def find_nvcc() -> str | None:
    """The CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def _version(nvcc: str) -> str:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", told)
    if found is None:
        raise SystemExit(f"{nvcc} --version: expected a release and a version, got {told!r}")
    return found[1]


def find_headers() -> Path | None:
    """The folder with cute/ and cutlass/, or None. The package that has it is found and not imported."""
    given = os.environ.get("ATTNCAP_CUTLASS")
    if given:
        folder = Path(given)
        if not (folder / "cute" / "config.hpp").is_file():
            raise SystemExit(f"ATTNCAP_CUTLASS: expected a folder with cute/ and cutlass/ in it, got {given}")
        return folder.resolve()
    package = importlib.util.find_spec("cutlass_library")
    places = [] if package is None else list(package.submodule_search_locations or ())
    folders = (Path(place) / "source" / "include" for place in places)
    return next((folder for folder in folders if (folder / "cute" / "config.hpp").is_file()), None)


def requirements() -> list[str]:
    """Packages that the build takes besides pyproject.toml's: the headers, where there is a compiler to read them."""
    given = "ATTNCAP_CUTLASS" in os.environ or "ATTNCAP_SANITIZE" in os.environ
    if os.environ.get("ATTNCAP_CUDA") == "0" or given or find_nvcc() is None:
        return []
    return [HEADERS_REQUIREMENT]


if __name__ == "__main__":
    print(*(name.partition(">")[0] for name in requirements()))  # noqa: T201 - for the Makefile
