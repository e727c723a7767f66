"""A run is the same bytes however it was computed, and after any damage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from attncap import scan as scan_module
from attncap.options import ScanOptions
from attncap.scan import scan
from attncap.store import Run, RunError, RunMismatchError, read_run
from tests import tiny
from tests.runs import contents
from tests.scan.scans import Messages, run_scan, stopped_run


@pytest.mark.parametrize(("workers", "threads"), [(1, 1), (1, 2), (3, 1), (5, 3)])
def test_neither_workers_nor_threads_change_a_bit(
    folder: Path, finished: Run, tmp_path: Path, workers: int, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run_scan(folder, tmp_path / "run", options=ScanOptions(workers=workers))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "run") == contents(finished.path)


def test_a_finished_run_is_verified_and_not_computed_again(
    folder: Path, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(scan_module, "run_shards", refuse)
    before = {name: (finished.path / name).stat().st_mtime_ns for name in contents(finished.path)}
    messages = Messages()
    run_scan(folder, finished.path, progress=messages)
    assert "nothing to do" in messages.said[-1]
    assert {name: (finished.path / name).stat().st_mtime_ns for name in contents(finished.path)} == before


def test_a_damaged_table_is_computed_again(folder: Path, finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    with open(tmp_path / "run" / "heads.parquet", "r+b") as table:
        table.seek(100)
        table.write(b"\0" * 8)
    messages = Messages()
    run_scan(folder, tmp_path / "run", progress=messages)
    assert any("damaged" in said for said in messages.said)
    assert contents(tmp_path / "run") == contents(finished.path)


@pytest.mark.parametrize("damage", ["edited", "no counts", "other types", "truncated", "empty", "removed"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_damaged_scan_json_is_made_again(
    folder: Path, finished: Run, stopped: Path, tmp_path: Path, damage: str, complete: bool
) -> None:
    run = shutil.copytree(finished.path if complete else stopped, tmp_path / "run")
    state = json.loads((run / "scan.json").read_text())
    whole = (run / "scan.json").read_bytes()
    if damage == "edited":
        state["counts"]["tokens"] = 7
    elif damage == "no counts":
        del state["counts"], state["progress"]
    elif damage == "other types":
        state |= {"model": 3, "counts": [], "progress": None, "spec": "all"}
    damaged = {"truncated": whole[:99], "empty": b""}.get(damage, json.dumps(state).encode())
    (run / "scan.json").write_bytes(damaged)
    if damage == "removed":
        (run / "scan.json").unlink()
    with pytest.raises(RunError, match=r"scan\.json"):
        read_run(run)
    messages = Messages()
    run_scan(folder, run, progress=messages)
    assert contents(run) == contents(finished.path)
    if damage != "removed":
        assert any("scan.json: damaged" in said for said in messages.said)
    assert complete or any("going on after 3 of 5 shards" in said for said in messages.said)


def test_parts_of_another_model_are_not_taken_without_scan_json(folder: Path, stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "scan.json").unlink()
    other = str(tiny.save_model(tmp_path / "other", seed=1))
    messages = Messages()
    corpus = [str(folder / "corpus.jsonl")]
    scan(other, corpus, run, progress=messages)
    assert sum("damaged, or of another run" in said for said in messages.said) == 3
    scan(other, corpus, tmp_path / "afresh")
    assert contents(run) == contents(tmp_path / "afresh")


def test_a_damaged_run_that_names_another_model_is_kept(folder: Path, finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    state = json.loads((tmp_path / "run" / "scan.json").read_text())
    state["model"]["fingerprint"] = "0" * 64
    (tmp_path / "run" / "scan.json").write_text(json.dumps(state))
    with pytest.raises(RunMismatchError, match=r"scan\.json: damaged, and it names another model or corpus"):
        run_scan(folder, tmp_path / "run")


@pytest.mark.parametrize("between", [1, 2, 16])
def test_damaged_shards_are_computed_again(
    folder: Path, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: int
) -> None:
    monkeypatch.setattr(scan_module, "_SHARDS_BETWEEN_MERGES", between)
    stopped_run(folder, tmp_path / "run", 4)
    parts = [
        path
        for path in sorted((tmp_path / "run" / "parts").iterdir())
        if path.suffix == ".bin" and path.stem != "survey"
    ]
    assert [path.name for path in parts] == {
        1: ["00003.bin", "merged.bin"],
        2: ["00002.bin", "00003.bin", "merged.bin"],
        16: ["00000.bin", "00001.bin", "00002.bin", "00003.bin"],
    }[between]
    for path in (parts[0], parts[-1]):
        data = bytearray(path.read_bytes())
        data[-5] ^= 255
        path.write_bytes(data)
    messages = Messages()
    run_scan(folder, tmp_path / "run", progress=messages)
    assert sum("damaged, " in said for said in messages.said) == 2
    assert contents(tmp_path / "run") == contents(finished.path)


def test_a_finished_run_that_may_not_be_written_is_verified(
    folder: Path, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    monkeypatch.setattr("attncap.store.os.access", lambda _path, mode: mode != os.W_OK)
    monkeypatch.setattr("attncap.store.lock_file", lambda *_: pytest.fail("a lock was made"))
    messages = Messages()
    run_scan(folder, tmp_path / "run", progress=messages)
    assert "nothing to do" in messages.said[-1]
    (tmp_path / "run" / "heads.parquet").unlink()
    with pytest.raises(RunError, match="may not be written"):
        run_scan(folder, tmp_path / "run")
