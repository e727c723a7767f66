"""Many workers make one run: the same bytes for any number of them, whoever is killed, and whatever the clock says."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from attncap import cli
from attncap import scan as scan_module
from attncap.claims import Claims, LauncherError, Place, find_place
from attncap.corpus import ShardSize
from attncap.progress import Progress
from attncap.store import RunFolder, read_run
from attncap.workers import read_status
from tests import tiny
from tests.runs import contents

DOCUMENTS = 640  # twenty shards of 32 documents, as in `tiny.CommandHost`


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, host: tiny.CommandHost) -> Path:
    """Holds a model, a corpus and the run "whole" of a single process."""
    folder = tmp_path_factory.mktemp("workers")
    tiny.save_model(folder / "model")
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(DOCUMENTS, seed=3))
    assert host.run(command(folder, folder / "whole"))[0] == 0, host.log()
    return folder


def command(folder: Path, output: Path) -> list[object]:
    return ["scan", folder / "model", folder / "corpus.jsonl", "-o", output]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers_gives_the_same_bytes(
    folder: Path, tmp_path: Path, host: tiny.CommandHost, workers: int
) -> None:
    codes, _ = host.run_workers(command(folder, tmp_path / "run"), workers)
    assert codes == [0] * workers, host.log()
    assert contents(tmp_path / "run") == contents(folder / "whole")
    assert host.log().count("See it: attncap report") == 1
    assert host.log().count("reading ") == 1  # one worker reads the corpus through, the others use what it found


def test_a_worker_that_is_killed_leaves_its_shards_to_the_others(
    folder: Path, tmp_path: Path, host: tiny.CommandHost
) -> None:
    codes, _ = host.run_workers(command(folder, tmp_path / "run"), 3, kills=[(0.3, 0)])
    assert codes[1:] == [0, 0], host.log()
    assert contents(tmp_path / "run") == contents(folder / "whole")


def test_kills_at_random_moments_and_other_numbers_of_workers_change_no_bit(
    folder: Path, tmp_path: Path, host: tiny.CommandHost
) -> None:
    source = random.Random(os.urandom(8))
    run = tmp_path / "run"
    killed = 0
    for _ in range(8):
        workers = source.randint(1, 3)
        victims = source.sample(range(workers), source.randint(1, workers))
        kills = [(source.uniform(0.0, 0.5), rank) for rank in victims]
        codes, _ = host.run_workers(command(folder, run), workers, kills)
        killed += sum(code < 0 for code in codes)
        assert all(code in (0, -9) for code in codes), host.log()
        if 0 in codes:
            assert contents(run) == contents(folder / "whole")
            shutil.rmtree(run)
    assert killed >= 4
    codes, _ = host.run_workers(command(folder, run), 2)
    assert codes == [0, 0], host.log()
    assert contents(run) == contents(folder / "whole")


def test_torchrun_restarts_a_worker_that_was_killed(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "-m"]
    program = folder / "small_shards.py"
    program.write_text(
        "import os, sys\n"
        "from attncap import cli, corpus, ledger, scan\n"
        "scan.SHARD_SIZE = corpus.ShardSize(documents=32)\n"
        "keep = ledger.Ledger.add\n"
        "def add(self, result):\n"
        "    keep(self, result)\n"
        "    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), 9)\n"
        "ledger.Ledger.add = add\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = ["small_shards", *map(str, command(folder, run))]
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(Path(__file__).parent.parent)])
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
    assert contents(run) == contents(folder / "whole")


def test_two_commands_at_once_into_one_folder(folder: Path, tmp_path: Path, host: tiny.CommandHost) -> None:
    """A command that no launcher started has the folder alone; workers of two launches share it."""
    run = tmp_path / "run"
    with RunFolder(run).lock(shared=True):
        code, _ = host.run(command(folder, run))
        assert code == 1
        assert "another scan is writing it" in host.log()
        codes, _ = host.run_workers(command(folder, run), 2)
        assert codes == [0, 0], host.log()
    assert read_run(run).scan == read_run(folder / "whole").scan
    with RunFolder(run).lock():
        codes, _ = host.run_workers(command(folder, run), 2)
        assert codes == [1, 1], host.log()


def test_a_clock_that_jumps_changes_nothing(folder: Path, tmp_path: Path, host: tiny.CommandHost) -> None:
    run = tmp_path / "run"
    for moment in (0, 2**33):  # the files say 1970, then 2242
        host.run_workers(command(folder, run), 2, kills=[(0.35, 0), (0.0, 1)])
        for path in run.rglob("*"):
            os.utime(path, (moment, moment))
    codes, _ = host.run_workers(command(folder, run), 3)
    assert codes == [0, 0, 0], host.log()
    assert contents(run) == contents(folder / "whole")


def test_a_run_that_others_finish_meanwhile_stays_finished(
    folder: Path, tmp_path: Path, host: tiny.CommandHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last shard of this worker and its next step, others find all done and finish the run."""
    run = tmp_path / "run"
    monkeypatch.setattr(scan_module, "SHARD_SIZE", ShardSize(documents=32))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    give_back, finished = Claims.give_back, []

    def others_go_on(self: Claims, number: int) -> None:
        give_back(self, number)
        if not finished and len(RunFolder(run).finished_shards()) == 20:
            finished.extend(host.run_workers(command(folder, run), 2)[0])

    monkeypatch.setattr(Claims, "give_back", others_go_on)
    scan_module.scan(str(folder / "model"), [str(folder / "corpus.jsonl")], run)
    assert finished == [0, 0], host.log()
    assert contents(run) == contents(folder / "whole")


# Claims.


def test_a_claim_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "claims")
    program = (
        "import sys; from pathlib import Path; from attncap.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1])); print(claims.take(1), claims.take(7), flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "claims")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True True\n"
        assert [claims.take(number) for number in (0, 1, 7, 8)] == [True, False, False, True]
        waited = threading.Event()

        def wait() -> None:
            with claims.alone(7):
                waited.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not waited.wait(0.1)
        holder.kill()
    waiting.join()
    assert claims.take(1)
    claims.close()


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(3, 8, 1, True)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Place(2, 4, 0, True)),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, Place(0, 1, 0, True)),
    ],
)
def test_a_launcher_says_which_worker_this_is(environment: dict[str, str], place: Place) -> None:
    assert find_place(environment) == place


@pytest.mark.parametrize(("rank", "message"), [("8", "expected a number below WORLD_SIZE = 8"), ("x", "whole numbers")])
def test_a_place_that_cannot_be_is_refused(rank: str, message: str) -> None:
    with pytest.raises(LauncherError, match=message):
        find_place({"RANK": rank, "WORLD_SIZE": "8"})


# Status.


def status_of(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["status", str(run)])
    return code, capsys.readouterr().out


def test_status_tells_a_finished_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = status_of(folder / "whole", capsys)
    assert code == 0
    assert said == f"{folder / 'whole'}: complete; 20 of 20 shards (100.0 %) of 640 documents\n"


def test_status_does_not_call_a_run_complete_whose_table_is_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "whole", tmp_path / "run")
    (tmp_path / "run" / "heads.parquet").write_bytes(b"PAR1")
    assert status_of(tmp_path / "run", capsys)[0] == 1
    (tmp_path / "run" / "heads.parquet").unlink()
    assert cli.main(["status", str(tmp_path / "run")]) == 1
    assert "heads.parquet: missing or damaged" in capsys.readouterr().err
    (tmp_path / "run" / "heads.parquet").mkdir()
    assert cli.main(["status", str(tmp_path / "run")]) == 2
    assert "a run has a file there, this is something else" in capsys.readouterr().err


def test_status_tells_a_scan_that_still_reads_its_corpus_from_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "run")
    assert cli.main(["status", str(run.path)]) == 2
    assert "no run of attncap (no scan.json); make one with `attncap scan" in capsys.readouterr().err
    with run.lock():
        claims = run.claims()
        code, said = status_of(run.path, capsys)
        claims.close()
    assert code == 3
    assert "a scan is reading its corpus through" in said
    assert "the same `attncap scan` command goes on" in said


def test_status_names_workers_that_died_and_documents_left_out(
    folder: Path, tmp_path: Path, host: tiny.CommandHost, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tiny.write_jsonl(tmp_path / "corpus.jsonl", [*tiny.texts(3000, seed=3), 5])
    scan = ["scan", folder / "model", corpus, "-o", tmp_path / "run"]
    host.run(scan, signal.SIGKILL, 0.2, after=tmp_path / "run" / "parts" / "00001.bin")
    code, said = status_of(tmp_path / "run", capsys)
    assert code == 3
    assert "not finished, and nobody is at work" in said
    assert re.search(r"worker 0 of 1 on \S+ \(process \d+\): died; its shard in progress is done again", said)
    assert "1 document left out because they could not be read" in said
    assert "corpus.jsonl:3001: expected text in 'text', got int" in said
    assert "The same `attncap scan` command goes on" in said


def test_status_sees_workers_at_work_and_how_they_ended(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "whole", tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    scan = run.read_scan()
    assert scan is not None
    run.write_scan({**scan, "status": "running"})
    program = (
        "import sys; from pathlib import Path; from attncap.claims import Claims, Place\n"
        "from attncap.progress import Progress; from attncap.store import RunFolder; from attncap import workers\n"
        "run = RunFolder(Path(sys.argv[1])); progress = Progress(); claims = run.claims()\n"
        "with workers.WorkerNote(run, Place(1, 3), claims, progress) as note:\n"
        "    progress.start(640, 0); progress.advance(100, 2200); note.write(); print(flush=True); sys.stdin.read()\n"
        "    raise RuntimeError('the model failed')\n"
    )
    command = [sys.executable, "-c", program, str(run.path)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        code, said = status_of(run.path, capsys)
        assert code == 3
        assert "running; 0 of 20 shards" in said
        assert re.search(r"1 worker at work: [\d,]+ tokens/s, [\d,.]+ documents/s, about \d+:\d\d left", said)
        assert re.search(r"worker 1 of 3 on \S+ \(process \d+\): 100 documents, [\d,]+ tokens/s", said)
        worker.communicate()
    _, said = status_of(run.path, capsys)
    assert re.search(r"worker 1 of 3 on \S+ \(process \d+\): the model failed", said)
    assert read_status(run.path).died[0].documents == 100


def test_an_interrupt_that_python_lost_ends_the_scan_after_a_batch(folder: Path, tmp_path: Path) -> None:
    progress = Progress()
    progress.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        scan_module.scan(str(folder / "model"), [str(folder / "corpus.jsonl")], tmp_path / "run", progress=progress)
    assert not read_status(tmp_path / "run").complete
