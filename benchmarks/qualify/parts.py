"""Runs the parts of a qualification, each in a process and a time of its own, and joins what they found."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import time
import traceback
from pathlib import Path
from typing import Any

from attncap.parts import write_whole
from benchmarks.qualify import building, report
from benchmarks.qualify.place import PROJECT, Place, file_name, lacks, stamp

# Seconds that each part may take; one that is stopped loses its own result and no other.
SECONDS = {"exact": 230, "determinism": 50, "graph": 25, "long": 75, "speed": 170, "sanitize": 105}


def qualify(names: tuple[str, ...], place: Place, *, results: Path | None, seconds: float) -> int:
    """Run the parts within `seconds` and write what they found to the folder `results`; the command's exit status."""
    missing = lacks(place) or _prepare(place)
    if missing is not None:
        print(f"qualify: {place.impl}: it takes {missing}. `python -m benchmarks.qualify --dry-run` takes no GPU.")
        return 2
    dry = place.dry
    results = results or PROJECT / ("build/qualify-dry" if dry else "benchmarks/results")
    folder = (results / "parts" if dry else PROJECT / "build" / "qualify") / place.impl
    deadline = time.monotonic() + seconds
    ran = []
    for name in names:
        path = folder / f"{name}.json"
        path.unlink(missing_ok=True)
        print(f"qualify: {place.impl}: {name} ...", flush=True)
        started = time.monotonic()
        _run_in_process(name, place, path, max(1.0, min(SECONDS[name], deadline - started)))
        took = f"{time.monotonic() - started:.0f} s"
        if path.exists():
            ran.append(json.loads(path.read_text()))
            print(f"qualify: {report.summary(name, ran[-1]['result'])} ({took})", flush=True)
        else:
            print(f"qualify: {name} LOST after {took}", flush=True)
    if ran:
        _write(ran[-1]["stamp"], folder, results)
    return int(len(ran) < len(names) or not all(one["result"]["passed"] for one in ran))


def _prepare(place: Place) -> str | None:
    """Have the CUDA kernels there, or the tests' model that stands in for a GPU. What is missing, or None."""
    if place.impl != "cuda":
        return None
    if not place.dry:
        why = building.build()
        return None if why is None else f"CUDA kernels, which cannot be built here: {why}"
    import pytest

    from tests import cuda_model

    cuda_model.install(cuda_model.build(cuda_model.FOLDER), pytest.MonkeyPatch())
    return None


def _run_in_process(name: str, place: Place, path: Path, seconds: float) -> None:
    """Run a part in a process of its own, which is stopped with all that it started when its time is up."""
    process = multiprocessing.get_context("fork").Process(target=_part, args=(name, place, path))
    process.start()
    assert process.pid
    try:
        process.join(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _part(name: str, place: Place, path: Path) -> None:
    os.setsid()  # a group of its own, which its children join
    try:
        result = importlib.import_module(f"benchmarks.qualify.{name}").run(place)
    except Exception as error:
        traceback.print_exc()
        result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps({"stamp": stamp(place), "result": result}, indent=2) + "\n").encode())


def _write(newest: dict[str, Any], folder: Path, results: Path) -> None:
    """Join the parts that hold for the same GPU, versions and kernels; qualify where they prove it."""
    read = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    same = {name for name in newest if name != "commit"}
    parts = {
        name: read[name]["result"]
        for name in SECONDS
        if name in read and all(read[name]["stamp"].get(key) == newest[key] for key in same)
    }
    base = results / file_name(newest["gpu"], newest["impl"])
    results.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({"stamp": newest, "parts": parts}, indent=2) + "\n"
    write_whole(base.with_suffix(".json"), whole.encode())
    write_whole(base.with_suffix(".md"), report.as_markdown(newest, parts).encode())
    print(f"qualify: wrote {base}.json and {base}.md")
    why = report.qualifies(newest, parts)
    if why is None:
        report.record(newest, parts, report.RECORD)
        print(f"qualify: {newest['impl']} is qualified on {newest['gpu']}; commit {report.RECORD}")
    else:
        print(f"qualify: nothing is put on record: {why}")
