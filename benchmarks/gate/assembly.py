"""What stands in a compiled kernel's machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

MATRIX = {"cuda": r"HGMMA|HMMA|UTC\w*MMA", "hip": r"v_mfma_"}
COPIES = {"cuda": r"LDGSTS|UTMALDG|UBLKCP", "hip": r"_load_\w+ .*\blds\b|_load_lds_"}
SPILLS = {"cuda": r"STL|LDL", "hip": r"scratch_(?:load|store)"}
# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Figures:
    """One kernel's figures. Counts are of instructions in the code, not of those that run."""

    registers: int
    spills: int
    stack: int  # bytes
    shared: int  # bytes
    warps: int
    stages: int
    matrix: int
    copies: int
    per_element: float | None  # instructions of the main loop for each score, summed over its threads; None without one


def read(kernel: Any, arch: str) -> Figures:
    """Figures of a kernel that Triton compiled for `arch`."""
    vendor = "cuda" if arch.startswith("sm_") else "hip"
    registers, stack, spills, text = _nvidia(kernel.asm["cubin"]) if vendor == "cuda" else _amd(kernel.asm["amdgcn"])
    lines = instructions(text, vendor)
    body = main_loop(lines, vendor)
    meta = kernel.metadata
    elements = _scores_of_tile(kernel) / (meta.num_warps * meta.warp_size)
    return Figures(
        registers=registers,
        spills=spills,
        stack=stack,
        shared=meta.shared,
        warps=meta.num_warps,
        stages=meta.num_stages,
        matrix=count(lines, MATRIX[vendor]),
        copies=count(lines, COPIES[vendor]),
        per_element=round(len(body) / elements, 2) if body else None,
    )


def _nvidia(cubin: bytes) -> tuple[int, int, int, str]:
    """(registers, bytes of stack, local loads and stores, disassembly), by the tools that Triton brings along."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return registers, stack, count(text.splitlines(), SPILLS["cuda"]), text


def _amd(text: str) -> tuple[int, int, int, str]:
    """The same of AMD's assembly, whose end states what the kernel takes."""
    names = (r"\.vgpr_count", r"\.private_segment_fixed_size", r"\.vgpr_spill_count")
    registers, stack, spills = (int(re.search(rf"{name}:\s*(\d+)", text)[1]) for name in names)  # type: ignore[index]
    return registers, stack, spills, text


def instructions(text: str, vendor: str) -> list[str]:
    """Instructions and labels ("name:"), one a line."""
    label = re.compile(r"\s*(\.L\w+):")
    operation = re.compile(r".*/\*[0-9a-f]{4,}\*/\s+(.*?);" if vendor == "cuda" else r"\s+([a-z]+_\w.*)")
    lines = []
    for line in text.splitlines():
        if found := label.match(line):
            lines.append(f"{found[1]}:")
        elif found := operation.match(line):
            lines.append(found[1])
    return lines


def main_loop(lines: list[str], vendor: str) -> list[str]:
    """The innermost loop with the most products; of several, the shortest: masks make the others longer."""
    every = loops(lines, vendor)
    inner = [one for one in every if not any(one != other and _holds(one, other) for other in every)]
    return _with_most_products(lines, inner, vendor)


def product_loop(lines: list[str], vendor: str) -> list[str]:
    """The same, but loops without products may stand in it."""
    before = _products_before(lines, vendor)
    every = [(first, last) for first, last in loops(lines, vendor) if before[last + 1] > before[first]]
    inner = [one for one in every if not any(one != other and _holds(one, other) for other in every)]
    return _with_most_products(lines, inner, vendor)


def loops(lines: list[str], vendor: str) -> list[tuple[int, int]]:
    """(first, last) line of each."""
    branch = re.compile(r"BRA.*`\((\.L\w+)\)" if vendor == "cuda" else r"s_c?branch\w*\s+(\.L\w+)")
    place = {line[:-1]: index for index, line in enumerate(lines) if line.endswith(":")}
    found_loops = []
    for index, line in enumerate(lines):
        found = branch.search(line)
        if found and place.get(found[1], index) < index:
            found_loops.append((place[found[1]], index))
    return found_loops


def _with_most_products(lines: list[str], spans: list[tuple[int, int]], vendor: str) -> list[str]:
    before = _products_before(lines, vendor)
    products = {(first, last): before[last + 1] - before[first] for first, last in spans}
    most = max(products.values(), default=0)
    fullest = [lines[first : last + 1] for (first, last), number in products.items() if 0 < number == most]
    bodies = [[line for line in body if not line.endswith(":")] for body in fullest]
    return min(bodies, key=len, default=[])


def _products_before(lines: list[str], vendor: str) -> list[int]:
    """How many products come before each line, and before the end."""
    product = re.compile(MATRIX[vendor])
    return list(accumulate((bool(product.search(line)) for line in lines), initial=0))


def _holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def count(lines: list[str], pattern: str) -> int:
    found = re.compile(pattern).search
    return sum(bool(found(line)) for line in lines)


def _scores_of_tile(kernel: Any) -> int:
    """Scores that a program makes in one step: rows x keys of the plan it was compiled for."""
    plan = next(value for value in kernel.src.constants.values() if hasattr(value, "BLOCK_M"))
    return int(plan.BLOCK_M.value * plan.BLOCK_N.value)
