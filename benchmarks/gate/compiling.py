"""Ahead-of-time compilation through the real launcher.

It happens in processes of its own, for it puts a driver in place that has no GPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks.gate import assembly
from benchmarks.gate.assembly import Figures
from benchmarks.gate.entries import ARCHS, Group, run_launcher

Table = dict[str, dict[str, Figures]]  # entry -> kernel -> figures


def compile_groups(work: dict[Group, tuple[str, ...]], processes: int) -> Iterator[tuple[Group, Table]]:
    """Compile the entries of each group, in `processes` processes; groups come as they are done."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {pool.submit(compile_group, group, statistics): group for group, statistics in work.items()}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def compile_group(group: Group, statistics: Iterable[str]) -> Table:
    """Figures of every kernel that the entries' calls would run."""
    table: Table = {}
    figures: dict[str, Figures] = {}  # by hash: several entries run the same kernels after the forward
    for name in statistics:
        with _compile_only(group.arch) as kernels:
            run_launcher(group, name)
        for _, kernel in kernels:
            if kernel.hash not in figures:
                figures[kernel.hash] = assembly.read(kernel, group.arch)
        table[group.name(name)] = worst((function, figures[kernel.hash]) for function, kernel in kernels)
    return table


def worst(found: Iterable[tuple[str, Figures]]) -> dict[str, Figures]:
    """By kernel. A call may run one twice, compiled for other tags and features: the one that spills more counts."""
    return dict(sorted(found, key=lambda one: (one[1].spills, one[1].registers)))


@contextlib.contextmanager
def _compile_only(arch: str) -> Iterator[list[tuple[str, Any]]]:
    """Inside, launching a kernel compiles it for `arch` and adds (name, compiled kernel) to the list."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))
        return kernels[-1][1]

    hip = torch.version.hip
    driver.set_active(_named_driver(arch))
    JITFunction.run = compile_instead
    torch.version.hip = "none" if arch.startswith("gfx") else None  # the launcher asks torch whose GPU it is
    try:
        yield kernels
    finally:
        JITFunction.run = run
        torch.version.hip = hip


def _named_driver(arch: str) -> Any:
    """A driver that names a target, which is all that compiling asks for."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)

    class NamedDriver(DriverBase):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return target

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing runs on a driver without a GPU")

        def get_current_device(self) -> int:
            return ARCHS.index(arch)  # Triton keeps what it compiled by the number of the device

        def get_current_stream(self, device: int) -> int:
            return 0

    return NamedDriver()
