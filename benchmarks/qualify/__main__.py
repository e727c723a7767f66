"""Qualify the Triton and the CUDA kernels on the GPU of this machine.

    python -m benchmarks.qualify                                  every part, within 9 minutes for each implementation
    python -m benchmarks.qualify --impl cuda                      of one implementation
    python -m benchmarks.qualify --parts exact,determinism        some; those of earlier runs are joined where GPU,
                                                                  versions and kernels are the same
    python -m benchmarks.qualify --dry-run --results FOLDER       on a model of a GPU; qualifies nothing

The CUDA kernels are built first, where they are not: see building/nvcc.py and building/carry.py for what that takes.

Exits with 0 where every part that ran passed, 1 where one failed, 2 where something is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

IMPLS = ("triton", "cuda")
MISSING = 2
PARTS = ("exact", "determinism", "graph", "long", "speed", "sanitize")


def main() -> int:
    given = _parser().parse_args()
    if given.dry_run:
        # Triton reads it when it is imported, which torch may do.
        os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("torch") is None:
        print(f"qualify: it takes torch, which {sys.executable} does not have: make qualify PYTHON=...")
        return MISSING
    from benchmarks.qualify.parts import qualify
    from benchmarks.qualify.place import Place

    places = [Place(given.dry_run, impl) for impl in given.impl]
    found = [qualify(given.parts, place, results=given.results, seconds=given.seconds) for place in places]
    # Not everything runs everywhere: what was not asked for by name may be missing.
    ran = [status for status in found if status != MISSING]
    return max(ran if ran and given.impl == IMPLS else found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.qualify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--impl", type=_impls, default=IMPLS, help=f"of {','.join(IMPLS)}")
    parser.add_argument("--results", type=Path, help="folder of gpu_<name>.json and gpu_<name>.md")
    parser.add_argument("--seconds", type=float, default=560, help="for all parts of an implementation")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    return _names(text, PARTS)


def _impls(text: str) -> tuple[str, ...]:
    return _names(text, IMPLS)


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = set(names) - set(known)
    if unknown:
        raise argparse.ArgumentTypeError(f"expected names of {','.join(known)}, got {','.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    sys.exit(main())
