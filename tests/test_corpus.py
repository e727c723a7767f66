"""Corpora: the same documents from every format, streamed, fingerprinted, and refused where they cannot be read."""

from __future__ import annotations

import csv
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attncap import corpus_readers
from attncap.corpus import Corpus, CorpusError, CorpusOptions, ShardSize, Survey
from attncap.types import MissingExtraError

DOCUMENTS = ["First one.", "Zweites Dökument, über Öl.", "third\nwith two lines", "4th, with a comma"]

THREE = ShardSize(documents=3)


def documents(*sources: str | Path, shard: int = 3, **options: object) -> list[str]:
    corpus = Corpus([str(source) for source in sources], CorpusOptions(**options))  # type: ignore[arg-type]
    size = ShardSize(shard)
    survey = corpus.survey(size)
    return [text for part in corpus.shards(survey) for text in part.texts]


def survey_of(*sources: str | Path, **options: object) -> Survey:
    return Corpus([str(source) for source in sources], CorpusOptions(**options)).survey(THREE)  # type: ignore[arg-type]


def write_txt(folder: Path) -> Path:
    path = folder / "c.txt"
    path.write_text("\n\n".join(DOCUMENTS) + "\n\n\n", encoding="utf-8")
    return path


def write_jsonl(folder: Path) -> Path:
    path = folder / "c.jsonl"
    path.write_text("\n".join(json.dumps({"n": 1, "text": text}) for text in DOCUMENTS), encoding="utf-8")
    return path


def write_csv(folder: Path, name: str = "c.csv", delimiter: str = ",") -> Path:
    path = folder / name
    with open(path, "w", encoding="utf-8", newline="") as handle:
        rows = csv.writer(handle, delimiter=delimiter)
        rows.writerow(["n", "text"])
        rows.writerows([1, text] for text in DOCUMENTS)
    return path


def write_parquet(folder: Path) -> Path:
    path = folder / "c.parquet"
    pq.write_table(pa.table({"n": range(len(DOCUMENTS)), "text": DOCUMENTS}), path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    "write", [write_txt, write_jsonl, write_csv, lambda folder: write_csv(folder, "c.tsv", "\t"), write_parquet]
)
def test_every_format_gives_the_same_documents(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)
    assert documents(path) == DOCUMENTS
    assert survey_of(path).fingerprint == survey_of(write_jsonl(tmp_path)).fingerprint


def test_a_txt_file_is_paragraphs_or_one_document(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n \t\r\nthree\r\n")
    assert documents(path) == ["one\ntwo", "three"]
    assert documents(path, txt_documents="file") == ["one\ntwo\n \t\nthree"]


def test_a_byte_order_mark_is_not_part_of_a_column_name(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(b"\xef\xbb\xbftext\nhello\n")
    assert documents(path) == ["hello"]


def test_folders_and_globs_are_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert documents(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert documents(tmp_path / "b.txt", tmp_path / "a.txt") == ["b.txt", "a.txt"]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "c.txt").symlink_to(tmp_path / "a.txt")
    assert documents(tmp_path / "b.txt", tmp_path / "*.txt", tmp_path) == ["b.txt", "a.txt"]


def test_empty_and_white_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["", "a", " \n\t\u00a0", "b"]) + "\n\n")
    survey = survey_of(path)
    assert (survey.documents, survey.empty, survey.failed) == (2, 2, 0)
    assert documents(path) == ["a", "b"]


def test_limit_ends_the_corpus_early(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path)
    assert documents(path, limit=2) == DOCUMENTS[:2]
    assert documents(path, limit=99) == DOCUMENTS


def test_shards_are_consecutive_and_can_be_chosen(tmp_path: Path) -> None:
    corpus = Corpus([str(write_jsonl(tmp_path))])
    survey = corpus.survey(THREE)
    assert [(shard.index, shard.texts) for shard in corpus.shards(survey)] == [
        (0, DOCUMENTS[:3]),
        (1, DOCUMENTS[3:]),
    ]
    assert [shard.index for shard in corpus.shards(survey, {1})] == [1]
    assert [shard.index for shard in corpus.shards(survey, {0})] == [0]
    assert list(corpus.shards(survey, ())) == []
    assert [shard.index for shard in corpus.shards(survey, take=lambda shard: shard == 1)] == [1]


def texts_with_gaps() -> list[str]:
    """Documents of every length, some of them empty, some with line ends and quotes in them."""
    odd = ["", " \n ", 'a "quoted", word', "two\nlines", "Öl\r\nim Wasser", "\u2028"]
    return [text for number in range(12) for text in (f"document {number}", odd[number % len(odd)])]


def txt_with_gaps(folder: Path) -> Path:
    path = folder / "gaps.txt"
    paragraphs = "\r\n \n\n".join(text for text in texts_with_gaps() if text.strip())
    path.write_bytes(b"\xef\xbb\xbf\n\n" + paragraphs.encode())
    return path


def jsonl_with_gaps(folder: Path) -> Path:
    path = folder / "gaps.jsonl"
    lines = [json.dumps({"text": text}) for text in texts_with_gaps()]
    lines[4:4] = ["", "{broken", '{"other": 1}']
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    return path


def csv_with_gaps(folder: Path) -> Path:
    path = folder / "gaps.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["multi\nline", "text"])
        for number, text in enumerate(texts_with_gaps()):
            rows.writerow([number, text] if number != 5 else [number])
            if number == 7:
                handle.write("\r\n")
    return path


def parquet_with_gaps(folder: Path) -> Path:
    path = folder / "gaps.parquet"
    pq.write_table(pa.table({"text": texts_with_gaps()}), path, row_group_size=5)
    return path


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("write", [txt_with_gaps, jsonl_with_gaps, csv_with_gaps, parquet_with_gaps])
def test_a_shard_by_itself_is_what_it_is_among_all(tmp_path: Path, write: Callable[[Path], Path], size: int) -> None:
    (tmp_path / "sub").mkdir()
    corpus = Corpus([str(write(tmp_path)), str(write(tmp_path / "sub")), "builtin:docstrings"], CorpusOptions(limit=60))
    survey = corpus.survey(ShardSize(size))
    shards = list(corpus.shards(survey))
    assert len(shards) == len(survey.shard_starts)
    for shard in shards:
        assert list(corpus.shards(survey, [shard.index])) == [shard]
    assert list(corpus.shards(survey, take=lambda index: index % 3 == 1)) == shards[1::3]


def test_a_shard_is_found_without_reading_those_before(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path)
    corpus = Corpus([str(path)])
    survey = corpus.survey(ShardSize(1))
    content = path.read_bytes()
    path.write_bytes(b"x" * content.index(b"\n") + content[content.index(b"\n") :])
    assert [shard.texts for shard in corpus.shards(survey, [1, 3])] == [[DOCUMENTS[1]], [DOCUMENTS[3]]]
    with pytest.raises(CorpusError, match="changed while it was being read"):
        list(corpus.shards(survey, [0]))


def test_shards_end_by_documents_or_by_characters_of_what_a_model_reads(tmp_path: Path) -> None:
    texts = ["a" * 6, "b", "c", "d" * 1000, "e"]
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    corpus = Corpus([str(path)])
    assert corpus.survey(ShardSize(documents=2)).shard_documents == (2, 2, 1)
    assert corpus.survey(ShardSize(characters=7)).shard_documents == (2, 2, 1)
    assert corpus.survey(ShardSize(characters=9, longest=6)).shard_documents == (4, 1)


def test_the_fingerprint_knows_contents_order_and_borders(tmp_path: Path) -> None:
    def fingerprint(*texts: str) -> str:
        path = tmp_path / "c.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return survey_of(path).fingerprint

    assert fingerprint("ab", "c") == fingerprint("ab", "c")
    assert len({fingerprint("ab", "c"), fingerprint("c", "ab"), fingerprint("a", "bc"), fingerprint("abc")}) == 4


def test_a_corpus_that_changes_between_the_passes_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path)
    corpus = Corpus([str(path)])
    survey = corpus.survey(THREE)
    path.write_text(path.read_text().replace("third", "THIRD"))
    with pytest.raises(CorpusError, match="changed while it was being read"):
        list(corpus.shards(survey))


BROKEN = {
    "not UTF-8 in txt": (
        "c.txt",
        b"fine\n\nsecond\nbad \xff\n",
        r"c\.txt:4: not UTF-8 \(byte 17 of the file is 0xff\)",
    ),
    "not UTF-8 in jsonl": ("c.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', r"c\.jsonl:2: not UTF-8"),
    "not UTF-8 in csv": ("c.csv", b"text\nfine\n\xe4\n", r"c\.csv:3: not UTF-8"),
    "broken line": ("c.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}\n', r"c\.jsonl:2: not JSON"),
    "not an object": ("c.jsonl", b'{"text": "a"}\n["b"]\n', r"c\.jsonl:2: expected a JSON object.*list"),
    "not text": ("c.jsonl", b'{"text": "a"}\n{"text": 7}\n', r"c\.jsonl:2: expected text in 'text', got int"),
    "null": ("c.jsonl", b'{"text": "a"}\n{"text": null}\n', r"c\.jsonl:2: expected text in 'text', got NoneType"),
    "half a character": ("c.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', r"c\.jsonl:2: .*surrogate"),
    "key missing": (
        "c.jsonl",
        b'{"text": "a"}\n{"body": "x", "id": 1}\n',
        r"c\.jsonl:2: no column 'text'.*'body', 'id'",
    ),
    "ragged row": ("c.csv", b"text,n\na,1\nb\n", r"c\.csv:3: expected 2 columns as in the first row, got 1"),
    "open quote": ("c.csv", b'text\na\n"b\n', r"c\.csv:3: broken row"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_document_that_cannot_be_read_is_named_or_counted(tmp_path: Path, case: str) -> None:
    name, data, message = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=message) as caught:
        survey_of(path, on_error="stop")
    assert "without --on-error stop" in str(caught.value)
    survey = survey_of(path)
    assert survey.failed == 1
    assert survey.documents >= 1
    assert len(survey.faults) == 1
    assert len(documents(path, on_error="skip")) == survey.documents


def test_a_missing_column_says_which_there_are(tmp_path: Path) -> None:
    for path in (write_csv(tmp_path), write_parquet(tmp_path)):
        with pytest.raises(CorpusError, match=r"no column 'body'; there is 'n', 'text' \(choose with --text-column\)"):
            survey_of(path, text_column="body", on_error="skip")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("text,text\na,b\n")
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "c.parquet")
    for name in ("c.csv", "c.parquet"):
        with pytest.raises(CorpusError, match=r"2 columns are called 'text'; give each a name of its own"):
            survey_of(tmp_path / name)


@pytest.mark.parametrize("columns", [[[1, -1]], [[[1, 2]]], [["a", "b"]], [[1.0]]])
def test_a_list_that_is_not_of_token_ids_is_called_that(tmp_path: Path, columns: list[object]) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": columns}), path)
    with pytest.raises(
        CorpusError, match=r"row 1: expected text in 'text', got a list of something else than token id"
    ):
        survey_of(path, on_error="stop")


def test_a_file_whose_name_is_not_utf8_is_read_like_others(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    path = folder / os.fsdecode(b"n\xff.txt")
    path.write_bytes(b"first\n\n\xff\n\nsecond")
    corpus = Corpus([str(folder)], CorpusOptions(group_by="folder"))
    survey = corpus.survey(THREE)
    assert (survey.groups, survey.failed) == ({"d\\xff": 2}, 1)
    assert survey == Survey.from_bytes(survey.to_bytes())
    before = corpus.state()
    os.utime(path, (1, 1))
    assert None is not corpus.state() != before


def test_a_parquet_file_whose_name_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    (tmp_path / "c.parquet").rename(tmp_path / os.fsdecode(b"\xff.parquet"))
    write_txt(tmp_path)
    survey = survey_of(tmp_path)
    assert (survey.documents, survey.failed) == (len(DOCUMENTS), 1)
    assert "not a Parquet file that can be read" in survey.faults[0]


def test_the_rows_before_a_shard_are_not_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": [str(number) for number in range(10_000)]}), path)  # one row group
    taken_apart: list[object] = []

    def watched(*columns: Any, strict: bool) -> Any:
        taken_apart.append(columns)
        return zip(*columns, strict=strict)

    monkeypatch.setattr(corpus_readers, "zip", watched, raising=False)
    found = corpus_readers.read_parquet(str(path), corpus_readers.ReadOptions("text", whole_files=False), (9_990, 0))
    assert [document.content for document in found] == [str(number) for number in range(9_990, 10_000)]
    assert len(taken_apart) == 1


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"c\.parquet: not a Parquet file that can be read"):
        survey_of(path, on_error="stop")


def test_a_missing_column_of_groups_says_how_it_is_chosen(tmp_path: Path) -> None:
    for path in (write_csv(tmp_path), write_parquet(tmp_path)):
        with pytest.raises(CorpusError, match=r"no column 'lang'; .* \(choose with --group-by\)"):
            survey_of(path, group_by="lang")


def test_numbers_in_a_parquet_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"c\.parquet: row 1: expected text in 'n', got int"):
        survey_of(write_parquet(tmp_path), text_column="n", on_error="stop")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.txt", r"absent\.txt: no such file or folder"),
        ("no/such/folder", "no such file or folder"),
        ("*.jsonl", r"no \.txt, .* file there"),
        ("builtin:books", "there is builtin:docstrings"),
        ("picture.svg", r"picture\.svg: expected a file that ends in \.txt"),
        (".", r"no \.txt, .* file there"),
        ("", "expected the name of a file, a folder or a dataset, got ''"),
        (300 * "x" + ".txt", r"x\.txt: cannot be looked for \(File name too long\)"),
    ],
)
def test_a_source_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.svg").write_bytes(b"")
    with pytest.raises(CorpusError, match=message):
        Corpus([source])


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c.csv"])
def test_a_corpus_without_text_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    if name == "c.csv":
        content = b"text\n" + content.replace(b"\xef\xbb\xbf", b"")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match="no document with text"):
        survey_of(tmp_path / name)


def test_a_corpus_of_nothing_but_faults_says_why(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("{\n{\n")
    with pytest.raises(CorpusError, match=r"2 could not be read, the first: .*c\.jsonl:1: not JSON"):
        survey_of(path, on_error="skip")


def test_a_dataset_id_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"attncap\[datasets\]") as raised:
        Corpus(["someone/some-texts:train"])
    assert isinstance(raised.value, CorpusError)  # an argument that is wrong: exit code 2


@pytest.mark.parametrize(("name", "value"), [("txt_documents", "line"), ("on_error", "ignore"), ("limit", 0)])
def test_unknown_options_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        CorpusOptions(**{name: value})  # type: ignore[arg-type]


def test_a_limit_that_is_no_int_is_refused() -> None:
    with pytest.raises(TypeError, match="limit: expected an int"):
        CorpusOptions(limit=2.5)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a named pipe")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.txt")
    with pytest.raises(CorpusError, match="read twice"):
        Corpus([tmp_path / "c.txt"])


def test_the_docstrings_are_some_hundreds_of_texts_and_import_nothing() -> None:
    before = set(sys.modules)
    texts = documents("builtin:docstrings")
    assert 300 <= len(texts) <= 2000
    assert all(len(text) >= 400 for text in texts)
    assert not {"this", "antigravity", "turtle", "smtplib"} & (set(sys.modules) - before)
    assert documents("builtin:docstrings", limit=5) == texts[:5]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    line = json.dumps({"text": "word " * 200}) + "\n"
    path.write_text(line * 20_000)
    corpus = Corpus([str(path)])
    tracemalloc.start()
    try:
        survey = corpus.survey()
        for _ in corpus.shards(survey):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert survey.documents == 20_000
    assert peak < 2**20 < path.stat().st_size
