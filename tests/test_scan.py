"""A scan is right (against eager maps), and the same bytes however it was computed, stopped and resumed."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from attncap import scan as scan_module
from attncap.corpus import Corpus, CorpusOptions, ShardSize
from attncap.encode import Encoded, EncodedShard, batches, encode, pad
from attncap.models import ModelError, load_model
from attncap.options import ScanOptions
from attncap.progress import Progress
from attncap.report.content import build_report
from attncap.scan import DEFAULT_SPEC, scan
from attncap.shards import ScanError, one_thread_per_operator
from attncap.store import Run, RunError, RunFolder, RunMismatchError, read_run
from attncap.types import StatSpec
from attncap.workers import read_status
from tests import tiny
from tests.runs import contents

DOCUMENTS = 150  # five shards


class Messages(Progress):
    """Keeps what a scan says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module", autouse=True)
def _small_shards() -> Iterator[None]:
    """Shards of 32 documents, as in `tiny.CommandHost`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "SHARD_SIZE", ShardSize(documents=32))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the model "model" and the corpus "corpus.jsonl"."""
    folder = tmp_path_factory.mktemp("scan")
    tiny.save_model(folder / "model")
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(DOCUMENTS))
    return folder


def run_scan(folder: Path, output: Path, **changes: Any) -> Run:
    arguments: dict[str, Any] = {"options": ScanOptions(workers=2), **changes}
    return scan(str(folder / "model"), [str(folder / "corpus.jsonl")], output, **arguments)


@pytest.fixture(scope="module")
def finished(folder: Path) -> Run:
    """The uninterrupted run that the others are held against."""
    return run_scan(folder, folder / "finished")


# What it says.


def eager_rows(folder: Path, documents: list[str]) -> dict[str, list[np.ndarray]]:
    """Statistic -> (layers, heads, rows) of each document, from the maps of the eager model in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModel.from_pretrained(folder / "model", attn_implementation="eager", dtype=torch.float64)
    rows: dict[str, list[np.ndarray]] = {}
    for text in documents:
        inputs = tokenizer(text, truncation=True, max_length=tiny.LONGEST, return_tensors="pt")
        with torch.no_grad(), one_thread_per_operator():
            maps = torch.cat(model.eval()(**inputs, output_attentions=True).attentions).numpy()
        tokens = inputs["input_ids"][0].numpy()
        position = np.arange(len(tokens))
        distance = np.abs(position[:, None] - position)
        after = np.concatenate([[-1], tokens[:-1]])
        entropy = -(maps * np.log(np.maximum(maps, 1e-300))).sum(-1)
        special = np.isin(tokens, tokenizer.all_special_ids)
        found = {
            "entropy": entropy,
            "relative_entropy": entropy / np.log(len(tokens)),
            "max_prob": maps.max(-1),
            "sink_mass": maps[..., :4].sum(-1),
            "diagonal_mass": (maps * (distance == 0)).sum(-1),
            "distance": (maps * distance).sum(-1),
            "collision": (maps**2).sum(-1),
            "offset_mass[-1]": (maps * (position[:, None] - position == 1)).sum(-1),
            "offset_mass[1]": (maps * (position[:, None] - position == -1)).sum(-1),
            "topk_mass": np.sort(maps, -1)[..., -8:].sum(-1),
            "received_mass": maps.sum(-2),
            "duplicate": (maps * (tokens[:, None] == tokens)).sum(-1),
            "induction": (maps * (tokens[:, None] == after)).sum(-1),
            "special_tokens": maps[..., special].sum(-1),
        }
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
    return rows


def test_every_number_is_that_of_the_eager_maps(folder: Path, finished: Run) -> None:
    expected = eager_rows(folder, tiny.texts(DOCUMENTS))
    table = finished.heads.to_pylist()
    assert {row["stat"] for row in table} == expected.keys() | {"lse", "max_logit"}
    assert len(table) == (len(expected) + 2) * tiny.LAYERS * tiny.HEADS
    for row in table:
        assert row["group"] == "all"
        assert row["module"] == f"encoder.layer.{row['layer']}.attention.self"
        if row["stat"] not in expected:
            continue
        values = np.concatenate([document[row["layer"], row["head"]] for document in expected[row["stat"]]])
        assert row["count"] == len(values)
        for name, wanted in (
            ("mean", values.mean()),
            ("std", values.std()),
            ("min", values.min()),
            ("max", values.max()),
        ):
            assert row[name] == pytest.approx(wanted, rel=1e-5, abs=2e-6), (row["stat"], name)
        for name, quantile in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
            low, high = np.quantile(values, [max(quantile - 0.01, 0), min(quantile + 0.01, 1)])
            assert low - abs(low) / 32 - 1e-4 <= row[name] <= high + abs(high) / 32 + 1e-4, (row["stat"], name)


def test_a_scan_of_one_document_is_that_documents_map(folder: Path, tmp_path: Path) -> None:
    for number, text in enumerate(tiny.texts(4, seed=9)):
        corpus = tiny.write_jsonl(tmp_path / f"{number}.jsonl", [text])
        heads = scan(str(folder / "model"), [str(corpus)], tmp_path / f"run{number}").heads.to_pylist()
        maps = eager_rows(folder, [text])
        for row in heads:
            if row["stat"] in maps:
                wanted = maps[row["stat"]][0][row["layer"], row["head"]].mean()
                assert row["mean"] == pytest.approx(wanted, rel=1e-5, abs=2e-6)


def test_counts_are_those_of_the_corpus(folder: Path, finished: Run) -> None:
    lengths = [len(text.split()) + 2 for text in tiny.texts(DOCUMENTS)]
    assert finished.scan["counts"] == {
        "documents": DOCUMENTS,
        "tokens": sum(min(length, tiny.LONGEST) for length in lengths),
        "truncated_documents": sum(length > tiny.LONGEST for length in lengths),
        "empty_documents": 0,
        "failed_documents": 0,
        "nonfinite_rows": 0,
    }
    assert finished.scan["limits"] == {"max_tokens": tiny.LONGEST}
    assert finished.scan["progress"] == {"shards_done": 5, "shards_total": 5}


def test_scan_json_says_what_was_scanned(folder: Path, finished: Run) -> None:
    assert list(finished.scan) == [
        "format", "status", "model", "corpus", "spec", "tags", "features", "limits", "options", "versions", "impl",
        "counts", "progress", "heads_sha256",
    ]  # fmt: skip
    assert finished.scan["status"] == "complete"
    model = finished.scan["model"]
    assert (model["architecture"], model["layers"], model["heads"]) == ("BertModel", tiny.LAYERS, tiny.HEADS)
    assert finished.scan["corpus"]["sources"] == [str(folder / "corpus.jsonl")]
    assert finished.scan["spec"]["offsets"] == [-1, 1]


def test_empty_and_failed_documents_are_counted(folder: Path, tmp_path: Path) -> None:
    corpus = tiny.write_jsonl(tmp_path / "corpus.jsonl", ["ba be", "", 5, " \n", "di do"])
    options = CorpusOptions(on_error="skip")
    counts = scan(str(folder / "model"), [str(corpus)], tmp_path / "run", corpus_options=options).scan["counts"]
    assert (counts["documents"], counts["empty_documents"], counts["failed_documents"]) == (2, 2, 1)


def test_only_what_is_asked_for_is_captured(folder: Path, tmp_path: Path) -> None:
    spec = StatSpec(entropy=True, max=False, sink=0, diagonal=None, topk=0)
    run = run_scan(folder, tmp_path / "run", spec=spec, options=ScanOptions(tags=()))
    assert {row["stat"] for row in run.heads.to_pylist()} == {"lse", "entropy", "relative_entropy"}


# The same bytes.


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


def test_the_size_of_shards_is_part_of_the_run(folder: Path, finished: Run, tmp_path: Path) -> None:
    run = run_scan(folder, tmp_path / "run", options=ScanOptions(shard_characters=1000))
    assert run.scan["progress"]["shards_total"] > 5
    assert run.scan["options"]["shard"]["characters"] == 1000
    for mine, theirs in zip(run.heads.to_pylist(), finished.heads.to_pylist(), strict=True):
        assert mine["count"] == theirs["count"]
        assert mine["mean"] == pytest.approx(theirs["mean"], rel=1e-5, abs=1e-6)
    with pytest.raises(RunMismatchError, match=r"options\.shard\.characters is 1000 there"):
        run_scan(folder, tmp_path / "run")


def test_the_size_of_batches_changes_rounding_at_most(folder: Path, finished: Run, tmp_path: Path) -> None:
    for batch_tokens in (1, 333):
        run = run_scan(folder, tmp_path / str(batch_tokens), options=ScanOptions(batch_tokens=batch_tokens))
        for mine, theirs in zip(run.heads.to_pylist(), finished.heads.to_pylist(), strict=True):
            assert mine["count"] == theirs["count"]
            assert mine["mean"] == pytest.approx(theirs["mean"], rel=1e-5, abs=1e-6)


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


class StopAfterError(Exception):
    """Ends a scan from within."""


def stopped_run(folder: Path, output: Path, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended after so many shards."""
    write_part = RunFolder.write_part

    def write_and_stop(self: RunFolder, part: Any) -> None:
        write_part(self, part)
        if part.shard == shards - 1:
            raise StopAfterError

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_part", write_and_stop)
        with pytest.raises(StopAfterError):
            run_scan(folder, output, options=ScanOptions(workers=1))


@pytest.mark.parametrize("damage", ["edited", "no counts", "other types", "truncated", "empty", "removed"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_damaged_scan_json_is_made_again(
    folder: Path, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, complete: bool
) -> None:
    run = tmp_path / "run"
    if complete:
        shutil.copytree(finished.path, run)
    else:
        stopped_run(folder, run, 3, monkeypatch)
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


def test_parts_of_another_model_are_not_taken_without_scan_json(
    folder: Path, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    stopped_run(folder, run, 3, monkeypatch)
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
    stopped_run(folder, tmp_path / "run", 4, monkeypatch)
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


def test_a_stopped_run_goes_on_with_the_shards_it_has(
    folder: Path, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_run(folder, tmp_path / "run", 3, monkeypatch)
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


def test_kills_at_random_moments_leave_no_trace(folder: Path, tmp_path: Path, host: tiny.CommandHost) -> None:
    corpus = tiny.write_jsonl(tmp_path / "corpus.jsonl", tiny.texts(640, seed=3))
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


def test_an_error_of_the_system_says_what_it_means(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(RunFolder, "write_scan", fail)
    with pytest.raises(RunError, match=r"run: the scan cannot go on, Permission denied \(somewhere\).*same command"):
        run_scan(folder, tmp_path / "run")


# What it refuses.


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"spec": replace(DEFAULT_SPEC, topk=3)}, r"spec\.topk is 8 there and 3 here"),
        ({"options": ScanOptions(tags=("induction",))}, r"tags is \["),
        ({"options": ScanOptions(batch_tokens=99)}, r"options\.batch_tokens is 1024 there and 99 here"),
        ({"options": ScanOptions(max_tokens=9)}, r"limits\.max_tokens is 32 there and 9 here"),
        ({"corpus_options": CorpusOptions(limit=149)}, r"corpus\.documents is 150 there and 149 here"),
    ],
)
def test_a_run_of_something_else_is_refused_with_the_difference(
    folder: Path, finished: Run, changes: dict[str, Any], named: str
) -> None:
    before = contents(finished.path)
    with pytest.raises(RunMismatchError, match=named):
        run_scan(folder, finished.path, **changes)
    assert contents(finished.path) == before


def test_another_model_is_refused(folder: Path, finished: Run, tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "other", seed=1)
    with pytest.raises(RunMismatchError, match=r"model\.fingerprint"):
        scan(str(other), [str(folder / "corpus.jsonl")], finished.path)


def test_the_same_model_elsewhere_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "copy")
    first, second = (load_model(str(place)) for place in (folder / "model", tmp_path / "copy"))
    assert first.fingerprint == second.fingerprint
    assert load_model(str(tmp_path / "copy"), dtype="bfloat16").fingerprint != first.fingerprint


def test_another_version_may_read_a_finished_run_but_not_go_on_with_one(
    folder: Path, finished: Run, tmp_path: Path
) -> None:
    for status in ("complete", "running"):
        run = tmp_path / status
        shutil.copytree(finished.path, run)
        state = RunFolder(run).read_scan()
        assert state is not None
        state["versions"]["torch"] = "1.0"
        state["status"] = status
        RunFolder(run).write_scan(state)
    run_scan(folder, tmp_path / "complete")
    with pytest.raises(RunMismatchError, match=r"versions\.torch is 1\.0 there"):
        run_scan(folder, tmp_path / "running")


def test_two_scans_into_one_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").lock(), pytest.raises(RunError, match="another scan is writing"):
        run_scan(folder, tmp_path / "run")


def test_nothing_is_left_behind_by_a_scan_that_cannot_begin(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        scan(str(tmp_path), [str(folder / "corpus.jsonl")], tmp_path / "run")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:gpt5", "there is builtin:minilm"),
        ("./nowhere", "no such folder"),
        ("", "got nothing"),
    ],
)
def test_a_model_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_a_model_with_damaged_weights_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path / "model"))


def test_a_model_that_fails_is_an_error_that_names_the_shard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any, **_inputs: Any) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(transformers.BertModel, "forward", fail)
    with pytest.raises(ScanError, match=r"shard \d+: the model failed.*index out of range"):
        run_scan(folder, tmp_path / "run", options=ScanOptions(workers=1))


@pytest.mark.parametrize(
    ("name", "value"), [("tags", ("nonsense",)), ("max_tokens", 2), ("batch_tokens", 0), ("workers", 0)]
)
def test_unknown_options_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        ScanOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("tags", "duplicate"), ("keep", "rows"), ("max_tokens", "8"), ("workers", 1.5)]
)
def test_options_of_another_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected"):
        ScanOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", 3), ("corpus", "c.txt"), ("corpus", [3]), ("spec", {}), ("corpus_options", {}), ("options", {})],
)
def test_arguments_of_another_kind_are_refused(name: str, value: Any, folder: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": folder / "model", "corpus": [folder / "corpus.jsonl"], "output": tmp_path / "run"}
    with pytest.raises(TypeError, match=f"(?i){name}: expected"):
        scan(**given | {name: value})


# Other kinds of models.


def tiny_gpt2(**sizes: Any) -> Any:
    return transformers.GPT2Model(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=20, **sizes))


def tiny_roberta(**sizes: Any) -> Any:
    # Positions are counted from 2 on here, so that of 30 embeddings 28 can be used.
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.RobertaModel(
        transformers.RobertaConfig(**shape, **sizes, max_position_embeddings=30, pad_token_id=1)
    )


def tiny_t5(**sizes: Any) -> Any:
    return transformers.T5Model(transformers.T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, **sizes))


@pytest.mark.parametrize(("build", "longest"), [(tiny_gpt2, 20), (tiny_roberta, 28), (tiny_t5, tiny.LONGEST)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_models_are_scanned_to_their_own_length(
    folder: Path, tmp_path: Path, build: Callable[..., Any], longest: int, dtype: str
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = load_model(str(folder / "model")).tokenizer
    special = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    build(vocab_size=len(tokenizer), **special).save_pretrained(tmp_path / "model")
    heads: list[bytes] = []
    for workers in (1, 2):
        output = tmp_path / f"run{workers}"
        options = ScanOptions(workers=workers, dtype=dtype)
        run = scan(str(tmp_path / "model"), [str(folder / "corpus.jsonl")], output, options=options)
        heads.append((output / "heads.parquet").read_bytes())
        assert run.scan["limits"] == {"max_tokens": longest}
        assert run.scan["options"]["dtype"] == dtype
        assert run.scan["counts"]["documents"] == DOCUMENTS
        assert {row["layer"] for row in run.heads.to_pylist()} == {0, 1}
    assert heads[0] == heads[1]


# Models and tokenizers that do not fit.


def test_a_default_tag_that_the_tokenizer_lacks_is_left_out(folder: Path, tmp_path: Path) -> None:
    model, corpus = str(tiny.save_gpt2(tmp_path / "model")), [str(folder / "corpus.jsonl")]
    messages = Messages()
    run = scan(model, corpus, tmp_path / "run", corpus_options=CorpusOptions(limit=9), progress=messages)
    assert run.scan["tags"] == ["induction", "duplicate"]
    assert any("no special tokens; going on without the tag special_tokens" in said for said in messages.said)


@pytest.mark.parametrize(("tag", "lacks"), [("special_tokens", "no special tokens"), ("segment", "no token_type_ids")])
def test_a_tag_that_was_asked_for_and_cannot_be_had_is_refused(tmp_path: Path, tag: str, lacks: str) -> None:
    model = str(tiny.save_gpt2(tmp_path / "model"))
    messages = Messages()
    with pytest.raises(ModelError, match=rf"{lacks}.*leave {tag} out of --tags"):
        scan(model, ["builtin:docstrings"], tmp_path / "run", options=ScanOptions(tags=(tag,)), progress=messages)
    assert messages.said == []  # before the corpus is read


def test_a_value_error_of_the_setup_is_one_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any) -> None:
        raise ValueError("numbers: expected others")

    monkeypatch.setattr(scan_module, "check_capturable", fail)
    with pytest.raises(ModelError, match=r"model: cannot be scanned with these options \(numbers: expected others\)"):
        run_scan(folder, tmp_path / "run")


def test_a_model_without_the_registry_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 16, "rotary_dim": 16, "vocab_size": 64}
    transformers.GPTJModel(transformers.GPTJConfig(**sizes)).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="GPTJModel"):
        scan(str(tmp_path / "model"), [str(folder / "corpus.jsonl")], tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_model_without_the_files_of_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "model" / name, tmp_path / "model")
    with pytest.raises(ModelError, match="tokenizer"):
        load_model(str(tmp_path / "model"))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    model = tiny.save_gpt2(tmp_path / "model", vocab_size=20)
    with pytest.raises(ModelError, match=r"tokenizer does not belong to the model.*20 tokens.*up to 29"):
        load_model(str(model))


def test_a_model_that_is_nowhere_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(ModelError, match=r"no such folder here, and the hub cannot be reached.*no route"):
        load_model("someone/some-model-that-is-not-there")


def test_an_interrupt_is_never_a_broken_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: Any, **_options: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("cannot import name") from error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(str(folder / "model"))


def test_rows_that_are_not_finite_are_counted(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    model = transformers.AutoModel.from_pretrained(tmp_path / "model")
    model.embeddings.position_embeddings.weight.data[20] = torch.nan
    model.save_pretrained(tmp_path / "model")
    run = scan(str(tmp_path / "model"), [str(folder / "corpus.jsonl")], tmp_path / "run")
    rows = [row for row in run.heads.to_pylist() if row["stat"] == "entropy"]
    lost = run.scan["counts"]["tokens"] * len(rows) - sum(row["count"] for row in rows)
    assert run.scan["counts"]["nonfinite_rows"] == lost > 0
    (said,) = (one for one in build_report(run).findings if "not finite" in one)
    assert f"{run.scan['counts']['nonfinite_rows']:,} rows" in said
    assert "--dtype float32" in said


# How documents become batches.


def encoded(*lengths: int, **inputs: list[list[int]]) -> list[Encoded]:
    """Documents of these numbers of tokens, or with these inputs."""
    inputs = inputs or {"input_ids": [[1] * length for length in lengths]}
    documents = zip(*inputs.values(), strict=True)
    return [Encoded(n, "all", dict(zip(inputs, one, strict=True)), len(one[0])) for n, one in enumerate(documents)]


def test_batches_hold_documents_of_like_length_within_the_budget() -> None:
    found = list(batches(encoded(5, 2, 9, 2, 3), 8))
    assert [[one.length for one in batch] for batch in found] == [[2, 2], [3], [5], [9]]


def test_padding_is_at_most_a_twentieth_of_every_batch() -> None:
    source = random.Random(4)
    documents = encoded(*(source.randint(3, 512) for _ in range(200)))
    found = list(batches(documents, 4096))
    assert sorted(one.number for batch in found for one in batch) == list(range(200))
    for batch in found:
        computed = len(batch) * max(one.length for one in batch)
        assert computed - sum(one.length for one in batch) <= 0.05 * computed <= 0.05 * 4096
    assert len(found) < 80


def test_padding_is_on_the_right_and_masked(folder: Path) -> None:
    tokenizer = load_model(str(folder / "model")).tokenizer
    inputs = pad(encoded(input_ids=[[7], [8, 9]], token_type_ids=[[0], [0, 1]]), tokenizer)
    assert inputs["input_ids"].tolist() == [[7, 0], [8, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert inputs["token_type_ids"].tolist() == [[0, 0], [0, 1]]


def test_a_cut_document_keeps_its_last_special_token(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(str(folder / "model"))
    corpus = Corpus([str(tiny.write_jsonl(tmp_path / "c.jsonl", ["ba " * 30, "ba " * 31, "ba"]))])
    (shard,) = corpus.shards(corpus.survey())
    tokens: EncodedShard = encode(shard, loaded, tiny.LONGEST)
    assert [one.length for one in tokens.sequences] == [32, 32, 3]
    assert all(one.inputs["input_ids"][-1] == loaded.tokenizer.sep_token_id for one in tokens.sequences)
    assert tokens.counts == {
        "documents": 3, "tokens": 67, "truncated_documents": 1, "empty_documents": 0, "failed_documents": 0,
    }  # fmt: skip


@pytest.mark.slow
def test_minilm_has_a_previous_token_head(tmp_path: Path) -> None:
    run = scan("builtin:minilm", ["builtin:docstrings"], tmp_path / "run", corpus_options=CorpusOptions(limit=24))
    means = {(row["layer"], row["head"], row["stat"]): row["mean"] for row in run.heads.to_pylist()}
    assert means[0, 2, "offset_mass[-1]"] > 0.7
    assert run.scan["limits"] == {"max_tokens": 512}
