"""Processes that run a model together are one worker of a run: what they find is what one process finds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from attncap.claims import LauncherError, Place
from attncap.options import ScanOptions
from attncap.store import RunFolder, read_run
from attncap.team import Team
from tests import tiny
from tests.runs import contents
from tests.test_distributed import HAS_PLAN

pytestmark = pytest.mark.skipif(
    not HAS_PLAN, reason="this release of Transformers does not resolve its plans by itself"
)

DOCUMENTS = 160  # five shards of 32 documents, as in `tiny.CommandHost`


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, host: tiny.CommandHost) -> Path:
    """Holds a model, a corpus, the run "single" of one process, and "pair" of two that run the model together."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    tiny.save_llama(folder / "model")
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(DOCUMENTS, seed=3))
    assert host.run(command(folder, folder / "single", processes=1))[0] == 0, host.log()
    assert host.run_workers(command(folder, folder / "pair"), 2)[0] == [0, 0], host.log()
    return folder


def command(folder: Path, output: Path, processes: int = 2) -> list[object]:
    options = ["--keep", "sequences", "--tensor-parallel", processes]
    return ["scan", folder / "model", folder / "corpus.jsonl", "-o", output, *options]


@pytest.mark.parametrize("table", ["heads", "sequences"])
def test_two_processes_find_what_one_finds_up_to_rounding(folder: Path, table: str) -> None:
    single, pair = (parquet.read_table(folder / run / f"{table}.parquet").to_pydict() for run in ("single", "pair"))
    assert list(single) == list(pair)
    for name, values in single.items():
        if isinstance(values[0], float):
            # Quantiles are read from bins: a value on the edge of one may fall into the next.
            tolerance = 1 / 32 if name.startswith("p") else 1e-4
            np.testing.assert_allclose(pair[name], values, rtol=tolerance, atol=1e-4, err_msg=name)
        else:
            assert pair[name] == values, name


def test_scan_json_tells_it_apart_and_has_the_same_model(folder: Path) -> None:
    single, pair = (read_run(folder / run).scan for run in ("single", "pair"))
    assert single["model"] == pair["model"]
    assert single["counts"] == pair["counts"]
    assert pair["options"] == {**single["options"], "tensor_parallel": 2}


def test_several_teams_share_a_run_without_a_changed_bit(folder: Path, tmp_path: Path, host: tiny.CommandHost) -> None:
    codes, _ = host.run_workers(command(folder, tmp_path / "run"), 4)
    assert codes == [0] * 4, host.log()
    assert contents(tmp_path / "run", "sequences.parquet") == contents(folder / "pair", "sequences.parquet")


def test_a_finished_run_is_left_as_it_is(folder: Path, host: tiny.CommandHost) -> None:
    before = contents(folder / "pair", "sequences.parquet")
    assert host.run_workers(command(folder, folder / "pair"), 2)[0] == [0, 0], host.log()
    assert host.log().count("complete and intact, nothing to do") == 1
    assert contents(folder / "pair", "sequences.parquet") == before


@pytest.mark.parametrize("victim", [0, 1])
def test_whoever_of_a_team_is_killed_it_ends_and_goes_on_later(
    folder: Path, tmp_path: Path, host: tiny.CommandHost, victim: int
) -> None:
    run = tmp_path / "run"
    kills = [(random.Random(os.urandom(8)).uniform(0.0, 0.2), victim)]
    codes, _ = host.run_workers(command(folder, run), 2, kills, after=run / "scan.json")
    assert codes[victim] in (-signal.SIGKILL, 0), host.log()
    assert codes[1 - victim] in (1, 0), host.log()
    assert host.run_workers(command(folder, run), 2)[0] == [0, 0], host.log()
    assert contents(run, "sequences.parquet") == contents(folder / "pair", "sequences.parquet")


def test_a_termination_signal_to_all_ends_the_batch_in_progress(
    folder: Path, tmp_path: Path, host: tiny.CommandHost
) -> None:
    corpus = tiny.write_jsonl(tmp_path / "corpus.jsonl", tiny.texts(3000, seed=3))
    arguments = ["scan", folder / "model", corpus, "-o", tmp_path / "run", "--tensor-parallel", 2]
    kills = [(0.2, 0), (0.0, 1)]
    first = RunFolder(tmp_path / "run").part_path(0)  # all are at work then
    codes, _ = host.run_workers(arguments, 2, kills, signal.SIGTERM, after=first)
    assert codes == [130, 130], host.log()
    assert "stopped; finished shards are kept, the same command goes on from there" in host.log()


def test_a_model_that_has_no_plan_is_refused_by_all(folder: Path, tmp_path: Path, host: tiny.CommandHost) -> None:
    tiny.save_model(tmp_path / "bert")
    arguments = ["scan", tmp_path / "bert", folder / "corpus.jsonl", "-o", tmp_path / "run", "--tensor-parallel", 2]
    assert host.run_workers(arguments, 2)[0] == [2, 2]
    assert "has no `tp_plan`" in host.log()


def test_the_followers_end_when_their_leader_fails(folder: Path, tmp_path: Path, host: tiny.CommandHost) -> None:
    """The leader alone reads the corpus."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text("no JSON\n")
    arguments = ["scan", folder / "model", broken, "-o", tmp_path / "run", "--tensor-parallel", 2]
    assert host.run_workers(arguments, 2)[0] == [2, 1]
    assert "no document with text in it" in host.log()
    assert "the first process of the team has failed" in host.log()


def test_torchrun_starts_a_team(folder: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "attncap"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    arguments = [*map(str, command(folder, tmp_path / "run")), "--limit", "8"]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 documents") == 1
    assert read_run(tmp_path / "run").scan["options"]["tensor_parallel"] == 2


@pytest.mark.parametrize(
    ("place", "message"),
    [(Place(0, 3, 0, launched=True), "multiple of 2 processes.* 3 were started"), (Place(), "no launcher started")],
)
def test_a_number_of_processes_that_makes_no_teams_is_refused(place: Place, message: str) -> None:
    with pytest.raises(LauncherError, match=message):
        Team(place, 2)


def test_plans_of_transformers_are_not_handed_through() -> None:
    with pytest.raises(ValueError, match="model_option: give --tensor-parallel, a number of processes, instead of tp_"):
        ScanOptions(model={"tp_plan": "auto"})
