"""The thin layer over instruction sets, checked on each set that this machine has by the program in tests/native."""

from __future__ import annotations

import fcntl
import functools
import os
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from attncap import _C

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tests" / "native"

# What the kernels' sources define, one per set.
MACROS = {
    "amx": ("ATTNCAP_AVX512", "ATTNCAP_BF16", "ATTNCAP_AMX"),
    "avx512bf16": ("ATTNCAP_AVX512", "ATTNCAP_BF16"),
    "avx512": ("ATTNCAP_AVX512",),
    "avx2": ("ATTNCAP_AVX2",),
    "portable": (),
}
OF_A_TYPE = (
    "memory", "arithmetic", "compare", "masks", "transpose", "sum_each", "exp", "tanh", "log", "next_above",
    "topk", "turned", "scores", "maxima", "values", "sums", "received", "strided", "narrow",
)  # fmt: skip
GROUPS = [f"{number}.{group}" for number in ("float", "double") for group in OF_A_TYPE]
GROUPS += ["half", "bfloat", "stored", "half.narrow", "bfloat.narrow"]
OF_PAIRS = ["pairs", "pairs.scores", "pairs.sums"]
OF_MATRICES = ["matrix.products", "matrix.denormals"]


def groups_of(isa: str) -> list[str]:
    pairs, matrices = (macro in MACROS[isa] for macro in ("ATTNCAP_BF16", "ATTNCAP_AMX"))
    return GROUPS + OF_PAIRS * pairs + OF_MATRICES * matrices


def compiler() -> list[str]:
    """The command that setup.py compiles C++ with."""
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler {command[0]}: install g++, or name one in CXX")
    return command


def build_and_run(isa: str, program: Path) -> str:
    """What the program prints for a set, with setup.py's flags but for less optimisation, which takes its time."""
    pytest.importorskip("pybind11", reason="setup.py, whose flags are wanted, needs it")
    setup = runpy.run_path(str(ROOT / "setup.py"))
    flags = [*setup["COMMON_FLAGS"], "-O1", *setup["sanitizer_flags"](), *setup["flags_for"](f"attention_{isa}.cpp")]
    defines = [f"-D{macro}" for macro in (f"ATTNCAP_ISA={isa}", *MACROS[isa])]
    source = [f"-I{ROOT / 'csrc'}", f"-I{NATIVE}", str(NATIVE / "lanes.cpp"), "-o", str(program)]
    subprocess.run([*compiler(), *flags, *defines, *source], check=True)
    done = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout + (f"program stopped with status {done.returncode}\n" if done.returncode else "")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """What the program of a set prints, by group; test processes side by side share what the first has built."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    @functools.cache
    def of(isa: str) -> dict[str, str]:
        if isa not in _C.instruction_sets():
            pytest.skip(f"this processor has no {isa}")
        printed = folder / f"lanes-{isa}.txt"
        with open(folder / f"lanes-{isa}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not printed.exists():
                printed.write_text(build_and_run(isa, folder / f"lanes-{isa}"))
        return dict(line.split(" ", 1) for line in printed.read_text().splitlines())

    return of


@pytest.mark.parametrize(("isa", "group"), [(isa, group) for isa in MACROS for group in groups_of(isa)])
def test_the_layer_holds(isa: str, group: str, report: Callable[[str], dict[str, str]]) -> None:
    assert report(isa).get(group, "not reached").startswith("ok ")


@pytest.mark.parametrize("isa", MACROS)
def test_every_group_of_checks_is_looked_at(isa: str, report: Callable[[str], dict[str, str]]) -> None:
    assert sorted(report(isa)) == sorted(groups_of(isa))
