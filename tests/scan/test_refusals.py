"""What a scan refuses: another run in its folder, and models that cannot be had."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from attncap import scan as scan_module
from attncap.corpus import CorpusOptions
from attncap.models import ModelError, load_model
from attncap.options import ScanOptions
from attncap.scan import DEFAULT_SPEC, scan
from attncap.shards import ScanError
from attncap.store import Run, RunError, RunFolder, RunMismatchError
from tests import tiny
from tests.runs import contents
from tests.scan.scans import Messages, run_scan

# Runs.


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


# Models and tokenizers.


def test_another_model_is_refused(folder: Path, finished: Run, tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "other", seed=1)
    with pytest.raises(RunMismatchError, match=r"model\.fingerprint"):
        scan(str(other), [str(folder / "corpus.jsonl")], finished.path)


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
