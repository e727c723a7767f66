"""Look at the machine code of the CUDA kernels in attncap._C, without a GPU, and print what it holds.

    python -m benchmarks.gate_cuda
    python -m benchmarks.gate_cuda --update      the figures found become the budgets

Exits with 1 where a rule is broken that budgets_cuda.json does not name, or a budget is exceeded; with 2 where there
are no kernels to look at, or no tools to do it with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gate.assembly import SPILLS, count, instructions, product_loop
from benchmarks.gate.budgets import SLACK, passes

PROJECT = Path(__file__).parents[1]
PATH = PROJECT / "benchmarks" / "gate" / "budgets_cuda.json"
TOOLS = ("cuobjdump", "nvdisasm", "c++filt")
# By kernel: (products, copies) that its instructions must have; the compiler has others for either.
NEEDED = {"attention_forward": ("HGMMA", "UTMALDG"), "received_mass_kernel": ("HMMA", "LDGSTS")}


@dataclass(frozen=True)
class Figures:
    """One kernel's figures. Counts are of instructions in the code, not of those that run."""

    registers: int
    stack: int  # bytes
    spills: int  # loads and stores of a thread's own memory
    products: int
    copies: int
    loop: int  # instructions of the main loop
    waits: int  # in it, for products


Table = dict[str, Figures]  # "sm_90a attention_forward<...>" -> figures


@dataclass(frozen=True)
class Budgets:
    """Committed figures, and by name what breaks a rule today."""

    compiler: str
    kernels: str  # hash of the sources
    table: Table
    known: tuple[str, ...]


class NothingToSeeError(Exception):
    """There is nothing to look at here, or nothing to do it with."""


def load() -> Budgets:
    record = json.loads(PATH.read_text())
    table = {kernel: Figures(**figures) for kernel, figures in record["table"].items()}
    return Budgets(record["compiler"], record["kernels"], table, tuple(record["known"]))


def save(budgets: Budgets) -> None:
    table = {kernel: asdict(figures) for kernel, figures in sorted(budgets.table.items())}
    record = {"compiler": budgets.compiler, "kernels": budgets.kernels, "known": budgets.known, "table": table}
    PATH.write_text(json.dumps(record, indent=1) + "\n")


def tool(name: str) -> str:
    """One of TOOLS: on PATH, beside nvcc, or among those that Triton brings along."""
    places = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    try:
        import triton

        places.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise NothingToSeeError(f"{name} is neither on PATH nor in CUDA_HOME nor among Triton's tools")
    return found


def built() -> Path:
    """The module with the kernels.

    Raises:
        NothingToSeeError: it has none.
    """
    try:
        from attncap import _C
    except ImportError as error:
        raise NothingToSeeError(f"attncap._C does not import: {error}") from error
    if _C.cuda_lacks:
        raise NothingToSeeError(f"attncap._C has no CUDA kernels: {_C.cuda_lacks}")
    return Path(_C.__file__)


def look(module: Path) -> Table:
    """Figures of every kernel in a library or object, for every architecture that it was compiled for."""
    table: Table = {}
    with tempfile.TemporaryDirectory() as folder:
        _output("cuobjdump", "-xelf", "all", str(module.resolve()), folder=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = re.search(r"sm_\w+?(?=\.)", cubin.name)
            assert arch is not None
            for symbol, figures in _figures(cubin).items():
                table[f"{arch[0]} {symbol}"] = figures
    names = _output("c++filt", *(entry.partition(" ")[2] for entry in table)).splitlines() if table else []
    return {f"{entry.partition(' ')[0]} {_short(name)}": table[entry] for entry, name in zip(table, names, strict=True)}


def _short(name: str) -> str:
    """received_mass_kernel<Received<BFloat16, 64, false>> of what c++filt says."""
    return (
        name.removeprefix("void ")
        .replace("attncap::", "")
        .partition("(received")[0]
        .rpartition("(")[0]
        .replace(" >", ">")
    )


def _figures(cubin: Path) -> Table:
    """By mangled name."""
    usage = _output("cuobjdump", "-res-usage", str(cubin))
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage)
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", _output("nvdisasm", "-c", str(cubin)), flags=re.MULTILINE)
    code = dict(zip(sections[1::2], sections[2::2], strict=True))
    return {name: _figures_of(name, int(registers), int(stack), code[name]) for name, registers, stack in found}


def _figures_of(name: str, registers: int, stack: int, text: str) -> Figures:
    lines = instructions(text, "cuda")
    products, copies = next(needed for kernel, needed in NEEDED.items() if kernel in name)
    loop = product_loop(lines, "cuda")
    return Figures(
        registers=registers,
        stack=stack,
        spills=count(lines, SPILLS["cuda"]),
        products=count(lines, rf"\b{products}\b"),
        copies=count(lines, rf"\b{copies}\b"),
        loop=len(loop),
        waits=count(loop, "WARPGROUP.DEPBAR"),
    )


def _output(name: str, *arguments: str, folder: str | None = None) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode != 0:
        raise NothingToSeeError(f"{name} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def reported() -> str:
    """What ptxas said of the kernels when they were compiled in place; "" where that was done elsewhere."""
    folder = PROJECT / "build" / f"objects-{sys.implementation.cache_tag}" / "csrc" / "cuda"
    return "".join(report.read_text() for report in sorted(folder.glob("*.report")))


def broken_rules(table: Table, report: str) -> dict[str, str]:
    """Name of each broken rule ("kernel: rule") -> what breaks it."""
    broken: dict[str, str] = {}
    for kernel, figures in table.items():
        function = kernel.partition(" ")[2].partition("<")[0]
        products, copies = NEEDED[function]
        if figures.spills:
            broken[f"{kernel}: spills"] = f"{figures.spills} loads and stores of spilled registers"
        if not figures.products:
            broken[f"{kernel}: {products}"] = "none"
        if not figures.copies:
            broken[f"{kernel}: {copies}"] = "none"
    for line in report.splitlines():
        if "wgmma" in line and "serializ" in line:
            broken["products that wait for one another"] = line.strip()
    return broken


def exceeded(table: Table, committed: Table) -> list[str]:
    """What the committed figures do not allow."""
    found = []
    for kernel, figures in table.items():
        allowed = committed.get(kernel)
        if allowed is None:
            found.append(f"{kernel}: has no budget")
            continue
        # Registers and instructions may move a little with a change elsewhere; what is in memory may not.
        most = {name: SLACK * getattr(allowed, name) for name in ("registers", "loop")}
        most |= {name: getattr(allowed, name) for name in ("stack", "spills")}
        for name, limit in most.items():
            got = getattr(figures, name)
            if got > limit:
                found.append(f"{kernel}: {name} {got}, budget {getattr(allowed, name)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gate_cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="make the figures found the committed budgets")
    arguments = parser.parse_args()
    try:
        table = look(built())
    except NothingToSeeError as error:
        print(f"gate_cuda: {error}")
        return 2
    _print(table)
    broken = broken_rules(table, reported())
    if arguments.update:
        from attncap import _C

        save(Budgets(_C.cuda_compiler, _C.cuda_hash, table, tuple(sorted(broken))))
    committed = load()
    return not passes(broken, exceeded(table, committed.table), committed.known)


def _print(table: Table) -> None:
    columns = tuple(Figures.__dataclass_fields__)
    width = max(len(kernel) for kernel in table)
    print(" " * width, *(f"{column:>9}" for column in columns))
    for kernel, figures in table.items():
        print(f"{kernel:{width}}", *(f"{value:9}" for value in asdict(figures).values()))


if __name__ == "__main__":
    sys.exit(main())
