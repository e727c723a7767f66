"""The device layer (csrc/cuda/device.h), on the model of a CTA that runs kernels on the CPU and, where it is, a GPU."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from building import nvcc
from tests import programs

NUMBERS = ("bfloat16", "float16")
OF_THE_LAYER = ["loads", "copies", "warps", "numbers"]
OF_THE_LAYER += [f"{group}.{number}" for group in ("products", "pipeline", "fragments") for number in NUMBERS]
GROUPS = {
    # What a function does, the same on model and hardware.
    "device": OF_THE_LAYER,
    # What the model must not let pass.
    "cta": [
        "mbarriers", "named_barriers", "warps", "registers", "memory", "tensor_maps", "pipelines", "products",
        "registers_of_products", "copies", "order",
    ],
    # Where things lie, against CuTe.
    "layouts": ["k_major", "mn_major", "swizzle", "fragments", "fields"],
}  # fmt: skip


def toolkit() -> nvcc.Toolkit:
    found = nvcc.toolkit()
    if isinstance(found, str):
        pytest.skip(f"no CUDA compiler with CuTe's headers: {found}")
    return found


def build_and_run(name: str, program: Path) -> str:
    if name == "layouts":
        found = toolkit()
        # Host code alone, in which CuTe complains of addresses of shared memory, which start at 0.
        options = ["-std=c++17", "-O0", "-w", "-cudart=none", f"-I{found.headers}", *programs.INCLUDES]
        source = str(programs.NATIVE / "layouts.cpp")
        subprocess.run([found.nvcc, *options, source, "-o", str(program)], check=True)
        printed = programs.run(program)
        return re.sub(r"^ERROR: cast_smem_ptr_to_uint .*\n", "", printed, flags=re.MULTILINE)
    programs.build(f"{name}.cpp", program)
    return programs.run(program)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """What a program prints, by group."""
    folder = programs.shared_folder(tmp_path_factory)
    return functools.cache(
        lambda name: programs.outcomes(folder, f"cta-{name}", functools.partial(build_and_run, name))
    )


@pytest.mark.parametrize(("name", "group"), [(name, group) for name in GROUPS for group in GROUPS[name]])
def test_the_model_holds(name: str, group: str, report: Callable[[str], dict[str, str]]) -> None:
    assert report(name).get(group, "not reached").startswith("ok ")


@pytest.mark.parametrize("name", GROUPS)
def test_every_group_of_checks_is_looked_at(name: str, report: Callable[[str], dict[str, str]]) -> None:
    assert sorted(report(name)) == sorted(GROUPS[name])


@pytest.fixture(scope="module")
def on_hardware(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The program `device` as nvcc compiles it, and what the compiler reports."""
    found = toolkit()
    program = tmp_path_factory.mktemp("hardware") / "device"
    command = found.command(str(programs.NATIVE / "device.cpp"), f"{program}.o", programs.INCLUDES)
    compiled = subprocess.run([command[0], "-x", "cu", *command[1:]], capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    subprocess.run([found.nvcc, f"{program}.o", "-cudart=static", "-o", str(program)], check=True)
    return program, compiled.stdout + compiled.stderr


def test_the_hardwares_layer_compiles_without_spills_or_waits(on_hardware: tuple[Path, str]) -> None:
    """The compiler warns where it has to wait for each wgmma (C7510)."""
    _, said = on_hardware
    assert "warning" not in said
    assert "wgmma" not in said
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) > 2 * len(OF_THE_LAYER)
    assert set(spills) == {("0", "0", "0")}


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU")
def test_the_hardware_does_what_the_model_does(on_hardware: tuple[Path, str]) -> None:
    lines = programs.run(on_hardware[0]).splitlines()
    assert sorted(line.split(" ")[0] for line in lines) == sorted(OF_THE_LAYER)
    assert [line for line in lines if " ok " not in line] == []
