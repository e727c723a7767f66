"""Answers the guide's questions anew and writes docs/guide.md, docs/guide/*.svg and docs/guide/numbers.json.

python -m scripts.guide            some minutes on one core
python -m scripts.guide --quick    on few documents, to see that everything works
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from scripts.guide.answers import write_guide
from scripts.guide.material import gather, train


def main() -> None:
    """Read the arguments, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few documents")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"), help="the folder written to")
    parser.add_argument("--work", type=Path, help="keep runs there, so that the next call need not make them again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small models are trained alike whatever the machine has
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        for path in write_guide(gather(folder, train(), quick=arguments.quick), arguments.output):
            print(path)


if __name__ == "__main__":
    main()
