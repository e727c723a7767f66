"""Qualify the Triton kernels on the GPU of this machine.

    python -m benchmarks.qualify                                  every part, within 9 minutes
    python -m benchmarks.qualify --parts exact,determinism        some; those of earlier runs are joined where GPU,
                                                                  versions and kernels are the same
    python -m benchmarks.qualify --dry-run --results FOLDER       interpreted on the CPU; qualifies nothing

Exits with 0 where every part that ran passed, 1 where one failed, 2 where something is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

PARTS = ("exact", "determinism", "graph", "long", "speed", "sanitize")


def main() -> int:
    given = _parser().parse_args()
    if given.dry_run:
        # Triton reads it when it is imported, which torch may do.
        os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("torch") is None:
        print(f"qualify: it takes torch, which {sys.executable} does not have: make qualify PYTHON=...")
        return 2
    from benchmarks.qualify.parts import qualify

    return qualify(given.parts, dry=given.dry_run, results=given.results, seconds=given.seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.qualify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--results", type=Path, help="folder of gpu_<name>.json and gpu_<name>.md")
    parser.add_argument("--seconds", type=float, default=560, help="for all parts together")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, at tiny sizes")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = set(names) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"expected names of {','.join(PARTS)}, got {','.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    sys.exit(main())
