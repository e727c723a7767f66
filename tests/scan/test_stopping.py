"""A scan that was stopped, by whatever, says so and goes on."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attncap import scan as scan_module
from attncap.store import Run, RunError, RunFolder, read_run
from attncap.workers import read_status
from tests import tiny
from tests.runs import contents
from tests.scan.scans import run_scan


def test_kills_at_random_moments_leave_no_trace(folder: Path, tmp_path: Path, host: tiny.CommandHost) -> None:
    corpus = tiny.write_jsonl(tmp_path / "corpus.jsonl", tiny.texts(320, seed=3))
    command = ["scan", folder / "model", corpus, "-o"]
    code, seconds = host.run([*command, tmp_path / "whole"])
    assert code == 0, host.log()
    source = random.Random(os.urandom(8))
    kills = 0
    for _ in range(12):
        code, _ = host.run([*command, tmp_path / "killed"], signal.SIGKILL, source.uniform(0.02, 0.9) * seconds)
        assert code in (0, -signal.SIGKILL), host.log()
        if code == 0:
            assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
            shutil.rmtree(tmp_path / "killed")
        else:
            kills += 1
    assert kills >= 3
    code, _ = host.run([*command, tmp_path / "killed"])
    assert code == 0, host.log()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_go_on(folder: Path, tmp_path: Path, host: tiny.CommandHost, number: int) -> None:
    corpus = tiny.write_jsonl(tmp_path / "corpus.jsonl", tiny.texts(3000, seed=3))
    command = ["scan", folder / "model", corpus, "-o", tmp_path / "run"]
    code, _ = host.run(command, number, 0.1, after=tmp_path / "run" / "scan.json")
    assert code == 130, host.log()
    assert "stopped; finished shards are kept, the same command goes on from there" in host.log()
    assert "Traceback" not in host.log()
    assert [note.state for note in read_status(tmp_path / "run").ended] == ["stopped"]
    state = json.loads((tmp_path / "run" / "scan.json").read_text())
    assert state["status"] == "running"
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_full_disk_is_said_and_the_run_goes_on_later(folder: Path, finished: Run, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for longest in (500, 3000):  # too short for scan.json, too short for a shard
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, limits[1]))
        try:
            with pytest.raises(RunError, match=r"the disk is full.*same command"):
                run_scan(folder, tmp_path / "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list((tmp_path / "run").rglob("*.tmp"))
    run_scan(folder, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(finished.path)


def test_an_error_of_the_system_says_what_it_means(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(RunFolder, "write_scan", fail)
    with pytest.raises(RunError, match=r"run: the scan cannot go on, Permission denied \(somewhere\).*same command"):
        run_scan(folder, tmp_path / "run")


def test_a_stopped_run_goes_on_with_the_shards_it_has(
    folder: Path, finished: Run, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(RunError, match="not finished"):
        read_run(tmp_path / "run")
    computed: list[int] = []
    run_shards = scan_module.run_shards

    def watch(work: Any, shards: Iterator[Any], workers: int, done: Any, advance: Any) -> None:
        def note(result: Any) -> None:
            computed.append(result.index)
            done(result)

        run_shards(work, shards, workers, note, advance)

    monkeypatch.setattr(scan_module, "run_shards", watch)
    run_scan(folder, tmp_path / "run")
    assert sorted(computed) == [3, 4]
    assert contents(tmp_path / "run") == contents(finished.path)
