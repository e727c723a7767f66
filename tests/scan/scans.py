"""Scans of a tiny model, and one that ends too early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attncap.options import ScanOptions
from attncap.progress import Progress
from attncap.scan import scan
from attncap.store import Run, RunFolder
from tests import tiny

DOCUMENTS = 150  # five shards


class Messages(Progress):
    """Keeps what a scan says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def save_subject(folder: Path) -> Path:
    """Write the model "model" and the corpus "corpus.jsonl" into a folder."""
    tiny.save_model(folder / "model")
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(DOCUMENTS))
    return folder


def run_scan(folder: Path, output: Path, **changes: Any) -> Run:
    arguments: dict[str, Any] = {"options": ScanOptions(workers=2), **changes}
    return scan(str(folder / "model"), [str(folder / "corpus.jsonl")], output, **arguments)


class StopAfterError(Exception):
    """Ends a scan from within."""


def stopped_run(folder: Path, output: Path, shards: int) -> Path:
    """A run that ended after so many shards."""
    write_part = RunFolder.write_part

    def write_and_stop(self: RunFolder, part: Any) -> None:
        write_part(self, part)
        if part.shard == shards - 1:
            raise StopAfterError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_part", write_and_stop)
        with pytest.raises(StopAfterError):
            run_scan(folder, output, options=ScanOptions(workers=1))
    return output
