"""The machine code of the CUDA kernels keeps its budgets; the budgets keep the rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attncap import _C
from benchmarks import gate_cuda
from benchmarks.gate import assembly
from benchmarks.gate_cuda import Figures, NothingToSeeError

FINE = Figures(registers=168, stack=0, spills=0, products=24, copies=15, loop=1000, waits=2)
FORWARD, RECEIVED = (
    "sm_90a attention_forward<Forward<Float16, 64>>",
    "sm_80 received_mass_kernel<Received<Float16, 64>>",
)
WARNING = "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ... in '_Z3foo'"


# One test, for looking takes most of its time.
def test_built_kernels_keep_the_rules_and_their_budgets() -> None:
    try:
        table = gate_cuda.look(gate_cuda.built())
    except NothingToSeeError as error:
        pytest.skip(str(error))
    committed = gate_cuda.load()
    assert set(gate_cuda.broken_rules(table, gate_cuda.reported())) <= set(committed.known)
    if committed.compiler != _C.cuda_compiler:
        pytest.skip(f"the budgets are those of {committed.compiler}, and this is {_C.cuda_compiler}")
    assert set(table) == set(committed.table)
    assert gate_cuda.exceeded(table, committed.table) == []


def test_committed_figures_break_no_rule_but_those_named() -> None:
    committed = gate_cuda.load()
    assert set(gate_cuda.broken_rules(committed.table, "")) == set(committed.known)


@pytest.mark.parametrize(
    ("kernel", "change", "rule"),
    [
        (FORWARD, {"spills": 1}, "spills"),
        (FORWARD, {"products": 0}, "HGMMA"),
        (FORWARD, {"copies": 0}, "UTMALDG"),
        (RECEIVED, {"products": 0}, "HMMA"),
        (RECEIVED, {"copies": 0}, "LDGSTS"),
    ],
)
def test_each_rule_is_held(kernel: str, change: dict[str, int], rule: str) -> None:
    assert gate_cuda.broken_rules({kernel: FINE}, "") == {}
    assert list(gate_cuda.broken_rules({kernel: replace(FINE, **change)}, "")) == [f"{kernel}: {rule}"]


def test_products_that_wait_for_one_another_are_told() -> None:
    assert list(gate_cuda.broken_rules({FORWARD: FINE}, f"ptxas info\n{WARNING}\n").values()) == [WARNING]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"registers": 176}, "registers 176, budget 168"),
        ({"stack": 8}, "stack 8, budget 0"),
        ({"spills": 3}, "spills 3, budget 0"),
        ({"loop": 1030}, "loop 1030, budget 1000"),
    ],
)
def test_exceeded_budgets_are_told(change: dict[str, int], told: str) -> None:
    assert gate_cuda.exceeded({FORWARD: FINE}, {FORWARD: FINE}) == []
    assert gate_cuda.exceeded({FORWARD: replace(FINE, **change)}, {FORWARD: FINE}) == [f"{FORWARD}: {told}"]
    assert gate_cuda.exceeded({FORWARD: FINE}, {}) == [f"{FORWARD}: has no budget"]


def test_the_loop_of_products_may_hold_others() -> None:
    appends = [".L_x_2:", "FADD", "@P1 BRA `(.L_x_2)"]
    inside = [".L_x_1:", "HGMMA 1", "HGMMA 2", *appends, "@P0 BRA `(.L_x_1)"]
    outer = [".L_x_0:", "HGMMA 0", *inside, "@P2 BRA `(.L_x_0)"]
    assert assembly.product_loop(outer, "cuda") == [line for line in inside if not line.endswith(":")]
