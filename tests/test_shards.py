"""How far a scan runs the model: to its last attention call, and no number depends on that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attncap.capture import Capture
from attncap.corpus import Corpus, CorpusOptions, ShardSize
from attncap.models import LoadedModel, load_model
from attncap.scan import DEFAULT_SPEC
from attncap.shards import Work, run_shards
from tests import tiny

SHARD = ShardSize(documents=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the model "model" and the corpus "corpus.jsonl"."""
    folder = tmp_path_factory.mktemp("shards")
    tiny.save_model(folder / "model")
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(SHARD.documents))
    return folder


def shard_of(folder: Path, loaded: LoadedModel) -> bytes:
    """The summary of the only shard."""
    work = Work(loaded, DEFAULT_SPEC, {}, tiny.LONGEST, 64, torch.device("cpu"))
    corpus = Corpus([str(folder / "corpus.jsonl")], CorpusOptions())
    results: list[bytes] = []
    shards = corpus.shards(corpus.survey(SHARD), SHARD)
    run_shards(work, shards, 1, lambda result: results.append(result.accumulator.to_bytes()), lambda *_: None)
    (found,) = results
    return found


def calls_of(module: nn.Module) -> list[int]:
    """Grows by one entry with each forward of the module."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_forwards_end_after_the_last_attention_call_once_the_first_has_shown_it(folder: Path) -> None:
    loaded = load_model(str(folder / "model"))
    layers = loaded.model.encoder.layer
    attention, first, last = (
        calls_of(layers[-1].attention.self),
        calls_of(layers[0].output),
        calls_of(layers[-1].output),
    )
    embeddings = calls_of(loaded.model.embeddings)
    shard_of(folder, loaded)
    assert len(embeddings) == len(first) > 5  # batches
    assert len(last) == len(attention) == 1


def test_where_forwards_end_changes_no_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = shard_of(folder, load_model(str(folder / "model")))
    monkeypatch.setattr("attncap.shards._ShardCapture.record", Capture.record)
    loaded = load_model(str(folder / "model"))
    last = calls_of(loaded.model.encoder.layer[-1].output)
    assert shard_of(folder, loaded) == ended
    assert len(last) > 5


def test_a_model_that_calls_a_module_twice_runs_to_its_end(folder: Path) -> None:
    loaded = load_model(str(folder / "model"))
    encoder, calls = loaded.model.encoder, calls_of(loaded.model.encoder)
    layers: Any = encoder.layer

    def run_twice(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], result: Tensor) -> Tensor:
        twice: Tensor = layers[0].forward(result, *args[1:], **kwargs)
        return twice

    layers[1].register_forward_hook(run_twice, with_kwargs=True)
    shard_of(folder, loaded)
    assert len(calls) > 5
