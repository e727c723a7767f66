"""The thin layer over instruction sets, checked on each set that this machine has by the program in tests/native."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from attncap import _C
from tests import programs

# What the kernels' sources define, one per set.
MACROS = {
    "amx": ("ATTNCAP_AVX512", "ATTNCAP_BF16", "ATTNCAP_AMX"),
    "avx512bf16": ("ATTNCAP_AVX512", "ATTNCAP_BF16"),
    "avx512": ("ATTNCAP_AVX512",),
    "avx2": ("ATTNCAP_AVX2",),
    "portable": (),
}
OF_A_TYPE = (
    "memory", "arithmetic", "compare", "masks", "places", "transpose", "sum_each", "exp", "tanh", "log", "next_above",
    "topk", "topk_lines", "turned", "scores", "maxima", "values", "sums", "received", "strided", "narrow",
)  # fmt: skip
GROUPS = [f"{number}.{group}" for number in ("float", "double") for group in OF_A_TYPE]
GROUPS += ["half", "bfloat", "stored", "half.narrow", "bfloat.narrow"]
OF_PAIRS = ["pairs", "pairs.scores", "pairs.sums"]
OF_MATRICES = ["matrix.products", "matrix.denormals"]


def groups_of(isa: str) -> list[str]:
    pairs, matrices = (macro in MACROS[isa] for macro in ("ATTNCAP_BF16", "ATTNCAP_AMX"))
    return GROUPS + OF_PAIRS * pairs + OF_MATRICES * matrices


def build_and_run(isa: str, program: Path) -> str:
    defines = [f"-D{macro}" for macro in (f"ATTNCAP_ISA={isa}", *MACROS[isa])]
    programs.build("lanes.cpp", program, defines, like=f"attention_{isa}.cpp")
    return programs.run(program)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """What the program of a set prints, by group."""
    folder = programs.shared_folder(tmp_path_factory)

    @functools.cache
    def of(isa: str) -> dict[str, str]:
        if isa not in _C.instruction_sets():
            pytest.skip(f"this processor has no {isa}")
        return programs.outcomes(folder, f"lanes-{isa}", functools.partial(build_and_run, isa))

    return of


@pytest.mark.parametrize(("isa", "group"), [(isa, group) for isa in MACROS for group in groups_of(isa)])
def test_the_layer_holds(isa: str, group: str, report: Callable[[str], dict[str, str]]) -> None:
    assert report(isa).get(group, "not reached").startswith("ok ")


@pytest.mark.parametrize("isa", MACROS)
def test_every_group_of_checks_is_looked_at(isa: str, report: Callable[[str], dict[str, str]]) -> None:
    assert sorted(report(isa)) == sorted(groups_of(isa))
