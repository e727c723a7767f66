"""Qualify the Triton kernels on the GPU of this machine.

    python -m benchmarks.qualify                                  every part, within 8 minutes
    python -m benchmarks.qualify --parts exact,determinism        some; those of earlier runs are joined where GPU,
                                                                  versions and kernels are the same
    python -m benchmarks.qualify --dry-run --results FOLDER       interpreted on the CPU; qualifies nothing

Exits with 0 where every part that ran passed, 1 where one failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.qualify import report
from benchmarks.qualify.place import PROJECT, Place, file_name, lacks_gpu, stamp

# Seconds that each part may take, in the order they run; a part that is stopped loses its own result and no other.
SECONDS = {"exact": 170, "determinism": 40, "graph": 25, "sanitize": 105, "long": 75, "speed": 140}
PARTS = ("exact", "determinism", "graph", "long", "speed", "sanitize")


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    place = Place(given.dry_run)
    if place.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        why = lacks_gpu()
        if why is not None:
            print(f"qualify: it takes a GPU, and {why}. `python -m benchmarks.qualify --dry-run` runs without one.")
            return 2
    results = given.results or (PROJECT / "build" / "qualify-dry" if place.dry else PROJECT / "benchmarks" / "results")
    parts_folder = results / "parts" if place.dry else PROJECT / "build" / "qualify"
    deadline = time.monotonic() + given.seconds
    ran = []
    for name in given.parts:
        path = parts_folder / f"{name}.json"
        path.unlink(missing_ok=True)
        print(f"qualify: {name} ...", flush=True)
        started = time.monotonic()
        within = max(1.0, min(SECONDS[name], deadline - started))
        _run_in_process(name, place, path, within)
        if not path.exists():
            print(f"qualify: {name} LOST: it was stopped after {time.monotonic() - started:.0f} s")
            continue
        ran.append(json.loads(path.read_text()))
        print(f"qualify: {report.summary(name, ran[-1]['result'])} ({time.monotonic() - started:.0f} s)", flush=True)
    if not ran:
        return 1
    _write(place, ran[-1]["stamp"], parts_folder, results)
    return int(len(ran) < len(given.parts) or not all(one["result"]["passed"] for one in ran))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.qualify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--results", type=Path, help="folder of gpu_<name>.json and gpu_<name>.md")
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, at tiny sizes")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = set(names) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"expected names of {','.join(PARTS)}, got {','.join(sorted(unknown))}")
    return names


def _run_in_process(name: str, place: Place, path: Path, seconds: float) -> None:
    """Run a part in a process of its own, which is stopped with all that it started when its time is up."""
    process = multiprocessing.get_context("fork").Process(target=_part, args=(name, place, path))
    process.start()
    process.join(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()


def _part(name: str, place: Place, path: Path) -> None:
    os.setsid()
    try:
        result = importlib.import_module(f"benchmarks.qualify.{name}").run(place)
    except Exception as error:
        traceback.print_exc()
        result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    report.write_whole(path, json.dumps({"stamp": stamp(place), "result": result}, indent=2) + "\n")


def _write(place: Place, newest: dict[str, Any], parts_folder: Path, results: Path) -> None:
    """Join the parts that hold for the same GPU, versions and kernels; qualify where they prove it."""
    read = {path.stem: json.loads(path.read_text()) for path in parts_folder.glob("*.json")}
    same = {name for name in newest if name != "commit"}
    parts = {
        name: read[name]["result"]
        for name in PARTS
        if name in read and all(read[name]["stamp"].get(key) == newest[key] for key in same)
    }
    base = results / file_name(newest["gpu"])
    report.write_whole(base.with_suffix(".json"), json.dumps({"stamp": newest, "parts": parts}, indent=2) + "\n")
    report.write_whole(base.with_suffix(".md"), report.as_markdown(newest, parts))
    print(f"qualify: wrote {base}.json and {base}.md")
    why = "it was interpreted" if place.dry else report.qualifies(parts)
    if why is None:
        report.record(newest, parts, report.RECORD)
        print(f"qualify: {newest['gpu']} is qualified; commit {report.RECORD}")
    else:
        print(f"qualify: nothing is put on record: {why}")


if __name__ == "__main__":
    sys.exit(main())
