"""What the tests of documents share: a model, corpora in three languages and a finished run, all of it only read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from attncap.corpus import CorpusOptions
from attncap.options import ScanOptions
from attncap.scan import scan
from attncap.store import Run
from tests import tiny
from tests.documents.languages import LANGUAGES


@pytest.fixture(scope="package", autouse=True)
def _small_shards() -> Iterator[None]:
    with tiny.small_shards(16):
        yield


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a model, a corpus with languages, and the corpus of each language by itself."""
    folder = tmp_path_factory.mktemp("documents")
    tiny.save_model(folder / "model")
    texts = tiny.texts(70, seed=5)
    lines = [{"text": text, "lang": LANGUAGES[place % 3]} for place, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for place, language in enumerate(LANGUAGES):
        tiny.write_jsonl(folder / f"{language}.jsonl", texts[place::3])
    return folder


@pytest.fixture(scope="package")
def kept(folder: Path) -> Run:
    options = ScanOptions(workers=2, keep=("sequences",))
    corpus_options = CorpusOptions(group_by="lang")
    return scan(
        str(folder / "model"),
        [str(folder / "corpus.jsonl")],
        folder / "kept",
        corpus_options=corpus_options,
        options=options,
    )
