"""What the tests of scans share: a model, a corpus and a finished run, of which tests only read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from attncap.store import Run
from tests import tiny
from tests.scan.scans import run_scan, save_subject, stopped_run


@pytest.fixture(scope="package", autouse=True)
def _small_shards() -> Iterator[None]:
    """Shards of 32 documents, as in `tiny.CommandHost`."""
    with tiny.small_shards(32):
        yield


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the model "model" and the corpus "corpus.jsonl"."""
    return save_subject(tmp_path_factory.mktemp("scan"))


@pytest.fixture(scope="package")
def finished(folder: Path) -> Run:
    """The uninterrupted run that the others are held against."""
    return run_scan(folder, folder / "finished")


@pytest.fixture(scope="package")
def stopped(folder: Path) -> Path:
    """A run that ended after three of its five shards, to be copied."""
    return stopped_run(folder, folder / "stopped", 3)
