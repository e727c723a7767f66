"""What a qualification leaves: gpu_<name>.json, the readable page beside it, and the record that `auto` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attncap import qualification
from attncap.parts import write_whole
from benchmarks.qualify.place import INTERPRETED

NEEDED = ("exact", "determinism", "speed")  # proved exact, and timed
HONOURED = ("exact", "determinism", "sanitize", "graph", "long")  # none of them may have failed


RECORD = Path(qualification.__file__).with_name(qualification.RECORD)


def qualifies(stamp: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str | None:
    """Why these parts qualify nothing, or None."""
    if stamp["gpu"] == INTERPRETED:
        return "nothing ran on a GPU"
    absent = [name for name in NEEDED if name not in parts]
    failed = [name for name in HONOURED if name in parts and not parts[name]["passed"]]
    if failed:
        return f"failed: {', '.join(failed)}"
    return f"not run: {', '.join(absent)}" if absent else None


def record(stamp: dict[str, Any], parts: dict[str, dict[str, Any]], path: Path) -> None:
    """Put the run on record in the place of older ones of this GPU."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [run for run in runs if (run["impl"], run["gpu"]) != (stamp["impl"], stamp["gpu"])]
    names = ("gpu", "kernels", "commit", "driver", "cuda", "torch", "triton", "python")
    rates = {dim: round(rate, 1) for dim, rate in parts["speed"]["TFLOP/s"].items()}
    runs.append({**{name: stamp[name] for name in ("impl", *names)}, qualification.SPEED: rates})
    runs.sort(key=lambda run: (run["gpu"], run["impl"]))
    write_whole(path, (json.dumps({"runs": runs}, indent=2) + "\n").encode())


def as_markdown(stamp: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str:
    """The page of a run."""
    why = qualifies(stamp, parts)
    lines = [
        f"# {stamp['gpu']}, {stamp['impl']}",
        "",
        "Made by `make qualify`. " + ("Qualified." if why is None else f"NOT qualified: {why}."),
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in stamp.items()]
    lines += ["", "## Checks", ""]
    for name in HONOURED:
        if name in parts:
            lines.append(f"- {name}: {_verdict(parts[name])}")
    if "long" in parts:
        lines += ["", "## One long layer", "", *_long(parts["long"])]
    if "speed" in parts:
        lines += ["", "## Speed", "", *_speed(parts["speed"])]
    return "\n".join(lines) + "\n"


def summary(name: str, part: dict[str, Any]) -> str:
    """What a part found, with every failure."""
    return f"{name}: {_verdict(part)}"


def _verdict(part: dict[str, Any]) -> str:
    told = "passed" if part["passed"] else "FAILED"
    if "missing" in part:
        return f"not run: {part['missing']}"
    counts = [f"{part[name]} {name}" for name in ("checks", "calls", "repeats") if name in part]
    failed = [f"{name}: {why}" for kind in ("failed", "differ", "wrong") for name, why in part.get(kind, {}).items()]
    if "error" in part:
        failed.append(part["error"])
    failed += [f"{tool}: {one['errors']} errors" for tool, one in part.get("tools", {}).items()]
    return ", ".join([told, *counts]) + "".join(f"\n  - {line}" for line in failed)


def _long(part: dict[str, Any]) -> list[str]:
    if "figures" not in part:
        return ["no figures"]
    sizes = ", ".join(f"{value} {name}" for name, value in part["sizes"].items())
    lines = [f"{sizes}, causal.", "", "| statistics | s | TFLOP/s | MiB beyond outputs |", "| --- | --- | --- | --- |"]
    for name, one in part["figures"].items():
        lines.append(f"| {name} | {one['seconds']:.2f} | {one['TFLOP/s']:.0f} | {_mib(one)} |")
    return lines


def _speed(part: dict[str, Any]) -> list[str]:
    if "shapes" not in part:
        return ["no figures"]
    lines = [
        "Medians of turns taken by all contestants of a shape, CUDA events, caches emptied before each call. TFLOP/s",
        "are 4 B H Q K D / time, half of it where causal, whatever else is computed, and 2.5 times that for backwards.",
        "`few` is lse, max, entropy, sink, diagonal and one offset.",
    ]
    for name, one in part["shapes"].items():
        lines += ["", f"### {name}", "", "| who | ms | TFLOP/s | MiB beyond outputs | fastest SDPA / it |"]
        lines.append("| --- | --- | --- | --- | --- |")
        for who, figures in one["figures"].items():
            ratio = one["fastest SDPA / it"].get(who)
            cells = f"{figures['ms']:.3f} | {figures['TFLOP/s']:.0f} | {_mib(figures)}"
            lines.append(f"| {who} | {cells} | {'' if ratio is None else f'{ratio:.2f}'} |")
        lines += [f"\n{who} does not serve it: {why}" for who, why in one["refused"].items()]
    lines += [
        "",
        "Processor time of one small call: " + ", ".join(f"{k} {v:.0f}" for k, v in part["host"].items()) + ".",
    ]
    return lines


def _mib(figures: dict[str, Any]) -> str:
    size = figures["bytes beyond outputs"]
    return "" if size is None else f"{size / 2**20:.1f}"
