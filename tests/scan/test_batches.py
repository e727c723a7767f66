"""How documents become batches."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import BatchEncoding

from attncap.corpus import Corpus
from attncap.encode import Encoded, EncodedShard, batches, encode, pad
from attncap.models import load_model
from tests import tiny


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


def test_a_tokenizer_that_does_not_keep_what_it_cuts_off_cuts_and_counts_alike(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(str(folder / "model"))
    corpus = Corpus([str(tiny.write_jsonl(tmp_path / "c.jsonl", ["ba " * 90, "ba " * 31, "ba " * 30, "", "ba"]))])
    (shard,) = corpus.shards(corpus.survey())
    tokenizer = loaded.tokenizer

    def forgetting(*arguments: Any, **options: Any) -> BatchEncoding:
        found = BatchEncoding(dict(tokenizer(*arguments, **options)))
        assert found.encodings is None
        return found

    expected, got = (encode(shard, one, tiny.LONGEST) for one in (loaded, replace(loaded, tokenizer=forgetting)))
    assert expected == got
    assert expected.counts["truncated_documents"] == 2
