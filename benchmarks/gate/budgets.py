"""What compiled kernels are held to: rules for all of them, and committed figures that none may exceed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gate.assembly import SHARED, Figures
from benchmarks.gate.compiling import Table
from benchmarks.gate.entries import FEW, NONE, Group

PATH = Path(__file__).with_name("budgets.json")
# Statistics that live in few tiles, and entropy: what they may add to a score at head dim 128 on sm_90.
MOST_ADDED = 1.5
# The same sources and compiler give the same code; this leaves room for a change that moves a few instructions.
SLACK = 1.02
WITHOUT_PRODUCTS = ("merge_parts", "select_candidates", "backward_levels")


@dataclass(frozen=True)
class Budgets:
    """Committed figures, and by name what breaks a rule today."""

    compiler: str  # Triton's version
    kernels: str  # hash of the sources
    table: Table
    known: tuple[str, ...]


def load() -> Budgets:
    record = json.loads(PATH.read_text())
    table = {
        entry: {kernel: Figures(**figures) for kernel, figures in kernels.items()}
        for entry, kernels in record["table"].items()
    }
    return Budgets(record["compiler"], record["kernels"], table, tuple(record["known"]))


def save(budgets: Budgets) -> None:
    record: dict[str, Any] = {"compiler": budgets.compiler, "kernels": budgets.kernels, "known": budgets.known}
    record["table"] = {
        entry: {kernel: asdict(figures) for kernel, figures in sorted(kernels.items())}
        for entry, kernels in sorted(budgets.table.items())
    }
    PATH.write_text(json.dumps(record, indent=1) + "\n")


def broken_rules(table: Table) -> dict[str, str]:
    """Name of each broken rule ("entry kernel: rule") -> the figure that breaks it."""
    broken: dict[str, str] = {}
    for entry, kernels in table.items():
        arch, dtype, *_ = entry.split()
        for kernel, figures in kernels.items():
            for rule, why in _broken_by(figures, kernel, arch, dtype):
                broken[f"{entry} {kernel}: {rule}"] = why
    return broken | _dear_statistics(table)


def _broken_by(figures: Figures, kernel: str, arch: str, dtype: str) -> list[tuple[str, str]]:
    broken = []
    if figures.spills:
        broken.append(("spills", f"{figures.spills} loads and stores of spilled registers"))
    if figures.shared > SHARED[arch]:
        broken.append(("shared memory", f"{figures.shared} bytes, {arch} has {SHARED[arch]}"))
    if dtype == "float32" or kernel in WITHOUT_PRODUCTS:  # float32 is multiplied by plain instructions (IEEE)
        return broken
    if not figures.matrix:
        broken.append(("matrix instructions", "none"))
    if arch.startswith("sm_") and figures.stages > 1 and not figures.copies:
        broken.append(("asynchronous copies", "none"))
    return broken


def _dear_statistics(table: Table) -> dict[str, str]:
    """Instructions that lse, max, entropy, sink, diagonal and offsets add to each score."""
    broken = {}
    for dtype in ("bfloat16", "float16"):
        group = Group("sm_90", dtype, 128)
        plain, few = (table.get(group.name(name), {}).get("attention_forward") for name in (NONE, FEW))
        if plain and few and plain.per_element is not None and few.per_element is not None:
            added = few.per_element - plain.per_element
            if added > MOST_ADDED:
                broken[f"{group.name(FEW)} attention_forward: cost of statistics"] = (
                    f"{added:+.2f} instructions a score"
                )
    return broken


def exceeded(table: Table, committed: Table) -> list[str]:
    """What the committed figures do not allow."""
    found = []
    for entry, kernels in table.items():
        for kernel, figures in kernels.items():
            allowed = committed.get(entry, {}).get(kernel)
            if allowed is None:
                found.append(f"{entry} {kernel}: has no budget")
                continue
            if figures.spills > allowed.spills:
                found.append(f"{entry} {kernel}: {figures.spills} spills, budget {allowed.spills}")
            if (figures.per_element or 0.0) > SLACK * (allowed.per_element or 0.0):
                found.append(
                    f"{entry} {kernel}: {figures.per_element} instructions a score, budget {allowed.per_element}"
                )
    return found


def passes(broken: Mapping[str, str], exceeded: Sequence[str], known: Collection[str]) -> bool:
    """Print what breaks a rule or exceeds a budget, and say whether all of it was known."""
    wrong = [f"{name}: {why}" for name, why in broken.items() if name not in known]
    wrong += exceeded
    for name, why in broken.items():
        if name in known:
            print(f"known: {name}: {why}")
    for line in wrong:
        print(f"FAILED: {line}")
    return not wrong
