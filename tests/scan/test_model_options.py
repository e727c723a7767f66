"""Options of a scan's model, which may be spread over devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attncap import cli
from attncap.corpus import CorpusOptions
from attncap.models import ModelError
from attncap.options import ScanOptions
from attncap.store import Run, read_run
from tests.scan.scans import run_scan

FEW = CorpusOptions(limit=24)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_scan(folder, tmp_path_factory.mktemp("whole") / "run", corpus_options=FEW)


@pytest.mark.parametrize("placed", ["auto", {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}])
def test_a_device_map_is_handed_through_and_changes_no_number(
    folder: Path, whole: Run, tmp_path: Path, placed: Any
) -> None:
    pytest.importorskip("accelerate")
    options = ScanOptions(model={"device_map": placed, "offload_folder": str(tmp_path / "offload")})
    found = run_scan(folder, tmp_path / "spread", corpus_options=FEW, options=options)
    assert found.heads == whole.heads
    assert found.scan["model"]["fingerprint"] == whole.scan["model"]["fingerprint"]
    assert found.scan["options"]["model"]["device_map"] == placed


def test_options_of_the_model_come_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    arguments = ["scan", str(folder / "model"), str(folder / "corpus.jsonl"), "--limit", "9"]
    arguments += ["-o", str(tmp_path / "run")]
    options = ["--model-option", "attn_implementation=eager", "--model-option", 'max_memory={"cpu": "1GiB"}']
    assert cli.main([*arguments, *options]) == 0
    found = read_run(tmp_path / "run").scan["options"]["model"]
    assert found == {"attn_implementation": "eager", "max_memory": {"cpu": "1GiB"}}
    assert cli.main([*arguments, "--model-option", "device_map"]) == 2


def test_an_option_that_the_model_does_not_take_is_one_message(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded as a model"):
        run_scan(folder, tmp_path / "run", options=ScanOptions(model={"colour": "red"}))
