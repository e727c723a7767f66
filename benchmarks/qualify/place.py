"""Where a qualification runs, and what names its results."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attncap import qualification

INTERPRETED = "none (interpreted)"
PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """A GPU, or its stand-in on the CPU (`dry`), where sizes are tiny and figures mean nothing; and whose kernels.

    What stands in for it is Triton's interpreter, and for the CUDA kernels the tests' model of a GPU.
    """

    dry: bool
    impl: str = "triton"

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those that the kernels serve; Triton's interpreter gets products of bfloat16 wrong."""
        if self.impl == "cuda":
            return (torch.float16, torch.bfloat16)
        return (torch.float32, torch.float16) + (() if self.dry else (torch.bfloat16,))

    @property
    def smallest_dim(self) -> int:
        """Of a head that the kernels serve, for tiny sizes."""
        return 64 if self.impl == "cuda" else 16

    @property
    def processes(self) -> int:
        """Processes that compile and run cases at the same time; each takes some 0.5 GiB of the GPU by itself."""
        return 2 if self.dry else 14

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.dry else full

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()


def lacks(place: Place) -> str | None:
    """What is missing here, or None. It leaves the GPU alone, so that processes can be forked after."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton, and it does not import: {error}"
    if place.dry:
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"a GPU, and torch {torch.__version__} is built without support for one"
    if torch.cuda.device_count() == 0:  # counted through NVML, which starts nothing
        return "a GPU, and the driver shows none"
    return None


def stamp(place: Place) -> dict[str, Any]:
    """What a result holds for: GPU, driver, versions, sources. Parts are joined where all of it agrees."""
    import triton

    found = {
        "gpu": INTERPRETED if place.dry else torch.cuda.get_device_name(),
        "driver": "none" if place.dry else _driver(),
        "cuda": str(torch.version.cuda or torch.version.hip),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "impl": place.impl,
        "kernels": qualification.HASHES[place.impl](),
    }
    if place.impl == "cuda":
        from attncap import _C

        found["compiler"] = _C.cuda_compiler
    if not place.dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory [GiB]": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def file_name(gpu: str, impl: str) -> str:
    """gpu_<name>, fit for a file; gpu_<name>_cuda for kernels other than Triton's."""
    name = gpu if impl == "triton" else f"{gpu} {impl}"
    return "gpu_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str:
    """The commit, marked where files differ from it."""
    return _output("git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]
