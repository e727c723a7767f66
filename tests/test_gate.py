"""Kernels compiled for GPUs that are not here keep their budgets; the budgets keep the rules."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gate import assembly, budgets, compiling
from benchmarks.gate.assembly import Figures
from benchmarks.gate.entries import ARCHS, DIMS, DTYPES, STATISTICS, Group

PROJECT = Path(__file__).parents[1]
FINE = Figures(128, 0, 0, 65536, 8, 3, matrix=16, copies=8, per_element=7.0)


# Compiling the whole table takes half an hour of processor time, so the tests take head dim 128 in bfloat16: on sm_90,
# where the cost of statistics is budgeted, kernel by kernel; elsewhere the call that runs the most code. The command
# without arguments compiles the rest, and what it found stands in budgets.json.
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_compiled_kernels_keep_their_budgets(arch: str) -> None:
    pytest.importorskip("triton")
    statistics = ["none", "few", "everything", "decoding", "backward of few"] if arch == "sm_90" else ["everything"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([".", "kernels", os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.gate", "--processes", "1", "--dtype", "bfloat16", "--dim", "128"]
    command += ["--arch", arch, "--statistics", *statistics]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_budgets_of_all_that_the_command_compiles() -> None:
    groups = [Group(arch, dtype, dim) for arch in ARCHS for dtype in DTYPES for dim in DIMS]
    assert {group.name(name) for group in groups for name in group.among(STATISTICS)} == set(budgets.load().table)


def test_committed_figures_break_no_rule_but_those_named() -> None:
    committed = budgets.load()
    assert set(budgets.broken_rules(committed.table)) == set(committed.known)


@pytest.mark.parametrize(
    ("figures", "rule"),
    [
        (replace(FINE, spills=1), "spills"),
        (replace(FINE, shared=200 << 10), "shared memory"),
        (replace(FINE, matrix=0), "matrix instructions"),
        (replace(FINE, copies=0), "asynchronous copies"),
    ],
)
def test_each_rule_is_held(figures: Figures, rule: str) -> None:
    entry = "sm_80 bfloat16 D 128 few"
    assert budgets.broken_rules({entry: {"attention_forward": FINE}}) == {}
    assert list(budgets.broken_rules({entry: {"attention_forward": figures}})) == [f"{entry} attention_forward: {rule}"]


def test_a_kernel_compiled_twice_for_a_call_is_judged_by_what_spills() -> None:
    spilling, later = replace(FINE, spills=2, registers=96), replace(FINE, registers=168)
    found = [("attention_forward", spilling), ("attention_forward", later), ("received_mass", FINE)]
    assert compiling.worst(found) == {"attention_forward": spilling, "received_mass": FINE}


def test_dear_statistics_and_exceeded_budgets_are_told() -> None:
    plain, few = "sm_90 bfloat16 D 128 none", "sm_90 bfloat16 D 128 few"
    table = {plain: {"attention_forward": FINE}, few: {"attention_forward": replace(FINE, per_element=8.6)}}
    assert budgets.broken_rules(table) == {
        f"{few} attention_forward: cost of statistics": "+1.60 instructions a score",
    }
    assert budgets.exceeded(table, table) == []
    assert budgets.exceeded(table, {plain: table[plain], few: table[plain]}) == [
        f"{few} attention_forward: 8.6 instructions a score, budget 7.0"
    ]
    assert budgets.exceeded(table, {plain: table[plain]}) == [f"{few} attention_forward: has no budget"]


def test_the_main_loop_is_the_shortest_of_those_with_the_most_products() -> None:
    masked = [".L_x_1:", "HGMMA 1", "HGMMA 2", "FSEL", "FADD", "BRA `(.L_x_1)"]
    plain = [".L_x_2:", "HGMMA 1", "HGMMA 2", "FADD", "@P0 BRA `(.L_x_2)"]
    band = [".L_x_3:", "HGMMA 1", "BRA `(.L_x_3)"]
    outer = [".L_x_0:", *masked, *plain, *band, "BRA `(.L_x_0)", ".L_x_4:", "BRA `(.L_x_4)"]
    assert assembly.main_loop(outer, "cuda") == plain[1:]
