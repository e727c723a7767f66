"""Groups of documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attncap.corpus import Corpus, CorpusError, CorpusOptions
from attncap.options import ScanOptions
from attncap.scan import scan
from attncap.store import Run
from tests.documents.languages import LANGUAGES


def test_each_group_has_the_statistics_of_its_documents_alone(folder: Path, kept: Run) -> None:
    rows = kept.heads.to_pylist()
    assert {row["group"] for row in rows} == set(LANGUAGES)
    assert kept.scan["corpus"]["groups"] == {"de": 24, "en": 23, "fr": 23}
    for language in LANGUAGES:
        corpus, options = [str(folder / f"{language}.jsonl")], ScanOptions(workers=2)
        alone = scan(str(folder / "model"), corpus, folder / language, options=options)
        mine = [row for row in rows if row["group"] == language]
        for row, expected in zip(mine, alone.heads.to_pylist(), strict=True):
            assert [row[name] for name in ("layer", "head", "stat", "count")] == [
                expected[name] for name in ("layer", "head", "stat", "count")
            ]
            for name in ("mean", "std", "min", "max"):
                assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=2e-6)


def test_groups_change_no_bit_with_the_number_of_workers(folder: Path, kept: Run, tmp_path: Path) -> None:
    options = ScanOptions(workers=1, keep=("sequences",))
    corpus_options = CorpusOptions(group_by="lang")
    corpus = [str(folder / "corpus.jsonl")]
    scan(str(folder / "model"), corpus, tmp_path / "run", corpus_options=corpus_options, options=options)
    for name in ("heads.parquet", "sequences.parquet", "scan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (kept.path / name).read_bytes()


def test_a_document_without_a_group_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a", "g": 1}\n{"text": "b", "g": null}\n{"text": "c"}\n{"text": "d", "g": true}\n')
    survey = Corpus([str(path)], CorpusOptions(group_by="g")).survey()
    assert survey.groups == {"1": 1, "True": 1}
    assert survey.faults == (
        f"{path}:2: expected the name of a group in 'g', got None",
        f"{path}:3: no column 'g'; there is 'text' (choose with --group-by)",
    )


def test_half_a_character_is_no_group(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a", "g": "\\ud800"}\n{"text": "b", "g": "x"}\n')
    survey = Corpus([str(path)], CorpusOptions(group_by="g")).survey()
    assert survey.groups == {"x": 1}
    assert survey.faults == (f"{path}:1: the group in 'g' holds half of a character (a lone surrogate)",)


def test_the_group_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    def fingerprint(group: str) -> str:
        path = tmp_path / "c.jsonl"
        path.write_text(json.dumps({"text": "a", "g": group}))
        return Corpus([str(path)], CorpusOptions(group_by="g")).survey().fingerprint

    assert fingerprint("x") != fingerprint("y")


def test_files_without_columns_are_grouped_by_their_folders(tmp_path: Path) -> None:
    for name in ("good/a.txt", "bad/b.txt", "bad/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some words")
    corpus = Corpus([str(tmp_path)], CorpusOptions(group_by="folder"))
    assert corpus.survey().groups == {"bad": 2, "good": 1}
    for source in (str(tmp_path), "builtin:docstrings"):
        with pytest.raises(CorpusError, match="has no columns"):
            Corpus([source], CorpusOptions(group_by="lang")).survey()


def test_too_many_groups_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "id": number}) + "\n" for number in range(300)))
    with pytest.raises(CorpusError, match="--group-by id: more than 256 groups"):
        Corpus([str(path)], CorpusOptions(group_by="id")).survey()
