"""A run's files: whole or not at all, checked before they are believed, one writer at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from attncap.parts import Part, write_whole
from attncap.store import (
    HEADS_COLUMNS,
    RunDamagedError,
    RunError,
    RunFolder,
    RunMismatchError,
    heads_bytes,
    read_run,
)
from tests.runs import head_rows, write_run


def test_a_run_is_read_back(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", head_rows([2, 2])))
    assert run.path == tmp_path / "run"
    assert tuple(run.heads.column_names) == HEADS_COLUMNS
    assert run.scan["status"] == "complete"


def test_equal_rows_give_equal_bytes() -> None:
    rows = head_rows([2, 3])
    assert heads_bytes(rows) == heads_bytes([dict(row) for row in rows])


def test_heads_parquet_opens_with_names_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", head_rows([1]))
    table = pq.ParquetFile(run / "heads.parquet").read(use_threads=False)
    assert table.column("stat").to_pylist()[0] == "entropy"
    assert {name: str(table.schema.field(name).type) for name in ("layer", "count", "mean")} == {
        "layer": "int32",
        "count": "int64",
        "mean": "double",
    }


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("heads.parquet", b"PAR1", "missing or damaged"),
        ("heads.parquet", None, "missing or damaged"),
        ("scan.json", None, "no run of attncap"),
        ("scan.json", b"", "damaged"),
        ("scan.json", b"{", "damaged"),
        ("scan.json", b"[]", "damaged .it is no JSON object"),
        ("scan.json", b"{}", "damaged .its sha256"),
        ("scan.json", b'{"format": 99}', "format 99"),
    ],
)
def test_a_run_that_is_not_whole_is_refused(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    run = write_run(tmp_path / "run", head_rows([1]))
    (run / name).unlink()
    if data is not None:
        (run / name).write_bytes(data)
    with pytest.raises(RunError, match=message):
        read_run(run)


def test_scan_json_keeps_names_that_are_not_utf8(tmp_path: Path) -> None:
    sources = [os.fsdecode(b"/n\xff.txt"), "/\u00fc.txt"]
    run = write_run(tmp_path / "run", head_rows([1]), corpus={"sources": sources, "documents": 1})
    assert read_run(run).scan["corpus"]["sources"] == sources


def test_a_run_that_is_not_finished_says_how_far_it_is(tmp_path: Path) -> None:
    progress = {"shards_done": 2, "shards_total": 5}
    with pytest.raises(RunError, match="2 of 5"):
        read_run(write_run(tmp_path / "run", head_rows([1]), status="running", progress=progress))


@pytest.mark.parametrize("field", ["status", "model", "counts", "heads_sha256", "sha256"])
def test_every_field_of_scan_json_is_under_its_digest(tmp_path: Path, field: str) -> None:
    path = write_run(tmp_path / "run", head_rows([1])) / "scan.json"
    scan = json.loads(path.read_text())
    path.write_text(json.dumps({**scan, field: "complete."}))
    with pytest.raises(RunDamagedError, match="damaged"):
        read_run(path.parent)
    path.write_text(json.dumps(dict(reversed(scan.items()))))  # the layout is of no importance
    assert read_run(path.parent).scan["status"] == "complete"


@pytest.mark.parametrize(("name", "kind"), [("scan.json", 0), ("heads.parquet", 0), (".lock", 0), ("parts", 1)])
def test_something_else_in_the_place_of_a_file_of_a_run_is_named(tmp_path: Path, name: str, kind: int) -> None:
    if kind:
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(RunMismatchError, match=rf"{name}: a run has a {('file', 'folder')[kind]} there"):
        RunFolder(tmp_path).check_usable()


def test_parts_that_are_not_ours_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "photo.jpg").write_text("")
    with pytest.raises(RunMismatchError, match=r"photo\.jpg"):
        RunFolder(tmp_path).check_usable()
    RunFolder(tmp_path).remove_parts()
    assert (tmp_path / "parts" / "photo.jpg").exists()


def test_a_part_survives_the_disk_and_no_other_bytes_do() -> None:
    part = Part(shard=7, digest="ab", counts={"tokens": 3}, payload=b"payload" * 50)
    data = part.to_bytes()
    assert Part.from_bytes(data) == part
    for place in range(len(data)):
        assert Part.from_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]) is None
        assert Part.from_bytes(data[:place]) is None


def test_a_part_of_another_shard_or_input_is_not_taken(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_part(Part(3, "mine", {}, b""))
    assert folder.read_part(3, "mine") is not None
    assert folder.read_part(3, "other") is None
    os.rename(folder.part_path(3), folder.part_path(4))
    assert folder.read_part(4, "mine") is None
    assert folder.read_part(5, "mine") is None


def test_the_merged_summary_replaces_the_shards_before_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for shard in range(4):
        folder.write_part(Part(shard, "d", {}, b""))
    folder.write_merged(Part(3, "three", {}, b"sum"))
    assert sorted(path.name for path in folder.parts.iterdir()) == ["00003.bin", "merged.bin"]
    kept = folder.read_merged({3: "three"}.__getitem__)
    assert kept is not None
    assert kept.payload == b"sum"
    assert folder.read_merged(lambda shards: "of another run") is None


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_one_may_write_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.lock(), pytest.raises(RunError, match="another scan is writing"), RunFolder(tmp_path / "run").lock():
        pass
    with folder.lock():
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_killed_writer_holds_no_lock_and_leaves_no_half_file(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from attncap.store import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]))\n"
        "with folder.lock():\n"
        "    (folder.path / 'scan.json.0f1e2d.tmp').write_text('{')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    RunFolder(tmp_path).check_usable()
    with RunFolder(tmp_path).lock():
        assert not (tmp_path / "scan.json.0f1e2d.tmp").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunMismatchError, match=r"holds files but is not a run.*thesis\.tex"):
        RunFolder(tmp_path).check_usable()
    with pytest.raises(RunMismatchError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").check_usable()
    RunFolder(tmp_path / "new" / "one").check_usable()


def test_the_digest_in_scan_json_is_that_of_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", head_rows([1]))
    assert read_run(run).scan["heads_sha256"] == hashlib.sha256((run / "heads.parquet").read_bytes()).hexdigest()
