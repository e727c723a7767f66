"""What `auto` takes on a GPU: the fastest of what has been qualified there, and what it says where nothing has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from attncap import dispatch, doctor, qualification
from benchmarks.qualify import report

GPU = "A GPU"
PROJECT = Path(__file__).parents[1]
Recorder = Callable[..., None]


def run_of(impl: str, kernels: str, **speeds: float) -> dict[str, Any]:
    by_dim = {name.removeprefix("d"): speed for name, speed in speeds.items()}
    return {"impl": impl, "gpu": GPU, "kernels": kernels, "commit": "0123abcd", qualification.SPEED: by_dim}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Recorder]:
    """Put runs on a record of the test's own, for kernels of two implementations whose sources have the hash "now"."""

    def put(*runs: dict[str, Any]) -> None:
        (tmp_path / qualification.RECORD).write_text(json.dumps({"runs": list(runs)}))
        forget()

    def forget() -> None:
        qualification.record.cache_clear()
        dispatch._warn_of_unqualified.cache_clear()

    monkeypatch.setattr(qualification.resources, "files", lambda _package: tmp_path)
    monkeypatch.setattr(qualification, "gpu_name", lambda _index: GPU)
    monkeypatch.setattr(qualification, "HASHES", {"triton": lambda: "now", "cuda": lambda: "now"})
    yield put
    forget()


def test_the_fastest_qualified_implementation_of_the_head_dim_is_taken(recorded: Recorder) -> None:
    recorded(run_of("triton", "now", d64=400, d128=450, d256=300), run_of("cuda", "now", d64=380, d128=600))
    taken = {dim: dispatch._on_gpu(("triton", "cuda"), 0, dim) for dim in (16, 64, 65, 128, 129, 256, 300)}
    assert taken == {16: "triton", 64: "triton", 65: "cuda", 128: "cuda", 129: "triton", 256: "triton", 300: "triton"}


def test_what_does_not_serve_the_call_is_not_taken(recorded: Recorder) -> None:
    recorded(run_of("triton", "now", d128=450), run_of("cuda", "now", d128=600))
    assert dispatch._on_gpu(("triton",), 0, 128) == "triton"


def test_kernels_that_have_changed_are_not_qualified(recorded: Recorder) -> None:
    recorded(run_of("triton", "now", d128=450), run_of("cuda", "before", d128=600))
    assert dispatch._on_gpu(("triton", "cuda"), 0, 128) == "triton"
    assert qualification.lacks("triton", GPU) is None
    assert "have changed since" in str(qualification.lacks("cuda", GPU))
    assert "no qualification run" in str(qualification.lacks("triton", "Another"))


def test_where_nothing_is_qualified_triton_is_taken_with_one_warning(recorded: Recorder) -> None:
    recorded()
    with pytest.warns(UserWarning, match="not qualified here: no qualification run of the triton kernels on A GPU"):
        assert dispatch._on_gpu(("triton", "cuda"), 0, 128) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._on_gpu(("triton", "cuda"), 0, 128) == "triton"


def test_compiled_calls_take_it_too(recorded: Recorder) -> None:
    recorded(run_of("triton", "now", d64=400, d128=450), run_of("cuda", "now", d64=380, d128=600))

    @torch.compile(backend="eager", fullgraph=True)
    def name_length(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.sum() * 0 + len(dispatch._on_gpu(("triton", "cuda"), 0, tensor.shape[-1]))

    assert name_length(torch.zeros(2, 64)).item() == len("triton")
    assert name_length(torch.zeros(2, 128)).item() == len("cuda")


def test_the_doctor_tells_what_is_qualified(recorded: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(run_of("triton", "now", d128=450))
    assert [(one.subject, one.verdict) for one in doctor._qualified()] == [
        ("triton qualified", GPU),
        ("cuda qualified", "on no GPU so far"),
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    triton, cuda = doctor._qualified()
    assert triton.verdict == "qualified at commit 0123abcd, TFLOP/s at D 128 450"
    assert "no qualification run" in cuda.verdict


def test_the_committed_record_can_be_read() -> None:
    for run in qualification.record():
        assert run["impl"] in qualification.HASHES
        assert all(speed > 0 for speed in run[qualification.SPEED].values())


def test_the_hash_names_the_kernels() -> None:
    assert len(qualification.triton_hash()) == 16


# The qualification run.


STAMP = dict.fromkeys(("gpu", "impl", "kernels", "commit", "driver", "cuda", "torch", "triton", "python"), "x")


def parts(**passed: bool) -> dict[str, dict[str, Any]]:
    return {name: {"passed": fine, "TFLOP/s": {"128": 450.04}} for name, fine in passed.items()}


def test_a_run_qualifies_when_it_is_exact_deterministic_and_timed(tmp_path: Path) -> None:
    path = tmp_path / qualification.RECORD
    for gpu in ("b", "a", "b"):
        report.record(STAMP | {"gpu": gpu, "impl": "triton"}, parts(exact=True, determinism=True, speed=True), path)
    runs = json.loads(path.read_text())["runs"]
    assert [(run["impl"], run["gpu"], run[qualification.SPEED]) for run in runs] == [
        ("triton", "a", {"128": 450.0}),
        ("triton", "b", {"128": 450.0}),
    ]


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (parts(exact=True, determinism=True, speed=True), None),
        (parts(exact=False, determinism=True, speed=True), "failed: exact"),
        (parts(exact=True, determinism=False, speed=True), "failed: determinism"),
        (parts(exact=True, determinism=True, speed=True, sanitize=False), "failed: sanitize"),
        (parts(exact=True, speed=True), "not run: determinism"),
    ],
)
def test_what_failed_or_did_not_run_qualifies_nothing(found: dict[str, Any], why: str | None) -> None:
    assert report.qualifies(STAMP, found) == why
    assert report.qualifies(STAMP | {"gpu": report.INTERPRETED}, found) == "nothing ran on a GPU"


def qualify(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", "kernels", os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.qualify", *arguments],
        capture_output=True, text=True, cwd=PROJECT, env=environment, check=False,
    )  # fmt: skip


def test_each_implementation_has_a_run_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / qualification.RECORD
    proved = parts(exact=True, determinism=True, speed=True)
    for impl in ("triton", "cuda", "triton"):
        report.record(STAMP | {"gpu": "a", "impl": impl}, proved, path)
    assert [run["impl"] for run in json.loads(path.read_text())["runs"]] == ["cuda", "triton"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    done = qualify()
    assert done.returncode == 2
    for impl in ("triton", "cuda"):
        assert f"qualify: {impl}: it takes a GPU" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "name"), [("triton", "gpu_none_interpreted"), ("cuda", "gpu_none_interpreted_cuda")])
def test_every_part_runs_without_a_gpu(impl: str, name: str, tmp_path: Path, cuda_native: ModuleType) -> None:
    pytest.importorskip("triton")
    before = report.RECORD.read_text()
    done = qualify("--dry-run", "--impl", impl, "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert list(found["parts"]) == ["exact", "determinism", "graph", "long", "speed", "sanitize"]
    assert all(part["passed"] for part in found["parts"].values())
    assert found["parts"]["exact"]["checks"] > 0
    assert "nothing runs on a GPU" in found["parts"]["sanitize"]["missing"]
    assert (found["stamp"]["impl"], found["stamp"]["kernels"]) == (impl, qualification.HASHES[impl]())
    page = (tmp_path / f"{name}.md").read_text()
    assert "NOT qualified: nothing ran on a GPU" in page
    assert "attncap, few + top 8" in page
    assert ("Triton's attncap, few + top 8" in page) == (impl == "cuda")
    assert report.RECORD.read_text() == before
