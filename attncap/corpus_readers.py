"""Readers: one generator per kind of source, giving its documents in order and a Fault where one cannot be read."""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import io
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from attncap.extras import require
from attncap.types import AttncapError

_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 1024
ALL_GROUP = "all"
BY_FOLDER = "folder"
DATASET_PREFIX = "dataset:"
_LONGEST_FIELD = 2**31 - 1

# One-line docstrings say little about attention; what remains are some hundreds of paragraphs of English and code.
_DOCSTRING_CHARACTERS = 400
# Left out by some distributors of Python, so that a corpus with them would differ from machine to machine.
_OPTIONAL_MODULES = frozenset(
    ("antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "test", "this", "tkinter", "turtle", "turtledemo")
)


Content = str | tuple[int, ...] | bytes
"""Text, token ids, or the file of an image."""


class CorpusError(AttncapError, ValueError):
    """A corpus cannot be read; the message names the file and the place in it."""


Bookmark = tuple[int, int]
"""Where a document begins: byte and line of a text file, row of a table; both count from 0, and a row has line 0."""

BEGINNING: Bookmark = (0, 0)


@dataclass(frozen=True)
class Document:
    """What a model reads at once, and the group whose statistics it counts for.

    A reader that starts `at` this document's bookmark gives it first.
    """

    content: Content
    group: str = ALL_GROUP
    at: Bookmark = field(default=BEGINNING, compare=False)


@dataclass(frozen=True)
class Fault:
    """Documents that cannot be read, mostly one, and why."""

    message: str
    documents: int = 1


@dataclass(frozen=True)
class ReadOptions:
    """Column that holds the content; whether a .txt file is one document; column that names the group, if any."""

    text_column: str
    whole_files: bool
    group_by: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [self.text_column] if self.group_by is None else [self.text_column, self.group_by]


def read_txt(place: str, options: ReadOptions, start: Bookmark) -> Iterator[Document | Fault]:
    """Paragraphs between blank lines, or the whole file."""
    group = _group_of_file(place, options)
    with open(place, "rb") as handle:
        if options.whole_files:
            yield _decode(place, handle.read().removeprefix(_BOM), BEGINNING, group)
            return
        paragraph: list[bytes] = []
        for at, line in _lines(handle, start):
            if line.strip():
                start = at if not paragraph else start
                paragraph.append(line)
            elif paragraph:
                yield _decode(place, b"".join(paragraph), start, group)
                paragraph = []
        if paragraph:
            yield _decode(place, b"".join(paragraph), start, group)


def read_jsonl(place: str, options: ReadOptions, start: Bookmark) -> Iterator[Document | Fault]:
    """One JSON object a line; lines without anything on them are no documents."""
    with open(place, "rb") as handle:
        for at, line in _lines(handle, start):
            if line.strip():
                yield _marked(_from_json(f"{place}:{at[1] + 1}", line, options), at)


def read_csv(place: str, options: ReadOptions, start: Bookmark) -> Iterator[Document | Fault]:
    """Comma-separated values (tab-separated in .tsv) with the names of the columns in the first row."""
    csv.field_size_limit(_LONGEST_FIELD)
    with open(place, "rb") as handle:
        rows = _Rows(place, handle, BEGINNING)
        try:
            header = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise CorpusError(f"{place}:1: not a row of names of columns ({error})") from error
        columns = [_column(place, header, name, options) for name in options.columns]
        if start != BEGINNING:
            rows = _Rows(place, handle, start)
        while True:
            at = rows.bookmark
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Fault(f"{place}:{rows.bookmark[1]}: broken row ({error})")
                continue
            if row:
                where = f"{place}:{rows.bookmark[1]}"
                yield _marked(_from_row(where, row, len(header), columns, options), at)


class _Rows:
    """Rows of a file of separated values; `bookmark` is where the next one begins."""

    def __init__(self, place: str, handle: BinaryIO, start: Bookmark) -> None:
        self.bookmark = start
        separator = "\t" if place.lower().endswith(".tsv") else ","
        self._rows = csv.reader(self._text(handle, start), delimiter=separator, strict=True)

    def _text(self, handle: BinaryIO, start: Bookmark) -> Iterator[str]:
        for (byte, number), line in _lines(handle, start):
            self.bookmark = (byte + len(line), number + 1)
            # Bytes that are not UTF-8 pass through as lone surrogates, so that the fault names the row they stand in.
            yield line.decode("utf-8", "surrogateescape")

    def __next__(self) -> list[str]:
        return next(self._rows)


def read_parquet(place: str, options: ReadOptions, start: Bookmark) -> Iterator[Document | Fault]:
    """Columns of a Parquet file, row group by row group; a damaged one is left out, the others are read."""
    parquet, pyarrow = require("pyarrow.parquet", "scan"), require("pyarrow", "scan")

    try:
        # Threads of pyarrow's own buy nothing here and may abort the interpreter as it exits.
        file = parquet.ParquetFile(place, pre_buffer=False)
    except (pyarrow.ArrowException, OSError, UnicodeEncodeError) as error:  # the last where the name is not UTF-8
        yield Fault(f"{place}: not a Parquet file that can be read ({_first_line(error)})")
        return
    with file:
        for name in options.columns:
            _column(place, file.schema_arrow.names, name, options)
        first = 0
        for group in range(file.metadata.num_row_groups):
            rows = range(first, first + file.metadata.row_group(group).num_rows)
            first = rows.stop
            if start[0] < rows.stop:
                yield from _row_group(place, file, group, rows, start[0], options)


def _row_group(
    place: str, file: Any, group: int, rows: range, start: int, options: ReadOptions
) -> Iterator[Document | Fault]:
    """The documents of one row group, which has these rows of the file, from row `start` on."""
    pyarrow, row = require("pyarrow", "scan"), rows.start
    try:
        batches = file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=options.columns, use_threads=False)
        for batch in batches:
            if row + batch.num_rows <= start:
                row += batch.num_rows
                continue
            # By name: a file has its columns in an order of its own.
            for scalars in zip(*(batch.column(name) for name in options.columns), strict=True):
                if row >= start:
                    yield _marked(_from_scalars(f"{place}: row {row + 1}", scalars, options), (row, 0))
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        row = max(row, start)
        lost = f"rows {row + 1} to {rows.stop}"
        yield Fault(f"{place}: {lost} are damaged ({_first_line(error)})", documents=rows.stop - row)


def read_dataset(place: str, options: ReadOptions, start: Bookmark) -> Iterator[Document | Fault]:
    """A Hugging Face dataset, streamed; ``name:split`` chooses the split, which is train otherwise.

    A name that is a folder is one that `save_to_disk` wrote, or one that the library's builders understand.
    """
    datasets = require("datasets", "datasets")
    name, _, split = place.removeprefix(DATASET_PREFIX).partition(":")
    try:
        if is_saved_dataset(Path(name)):
            rows = datasets.load_from_disk(name)
            rows = rows[split or "train"] if hasattr(rows, "keys") else rows
            rows = rows.select(range(start[0], len(rows)))
        else:
            rows = datasets.load_dataset(name, split=split or "train", streaming=True).skip(start[0])
    except Exception as error:  # the library raises its own, the network's and the file system's
        raise CorpusError(f"{place}: cannot be loaded as a dataset ({_first_line(error)})") from error
    records, row = iter(rows), start[0]
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:
            yield Fault(f"{place}: damaged after row {row} ({_first_line(error)})")
            return
        yield _marked(_from_mapping(f"{place}: row {row + 1}", record, options), (row, 0))
        row += 1


def read_image(place: str, options: ReadOptions, _start: Bookmark) -> Iterator[Document | Fault]:
    """A file that is one image."""
    yield Document(Path(place).read_bytes(), _group_of_file(place, options))


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder is one that the `save_to_disk` of the library datasets wrote."""
    kinds = (("dataset_dict.json",), ("dataset_info.json", "state.json"))
    return any(all((folder / name).is_file() for name in names) for names in kinds)


def read_docstrings(place: str, options: ReadOptions, start: Bookmark) -> Iterator[Document | Fault]:
    """Documentation strings of Python's standard library, of 400 characters or more.

    Taken from the sources, no module is imported. The order is that of a digest of their names: any first part of it
    is a fair sample.
    """
    if options.group_by is not None:
        raise CorpusError(f"{place}: has no columns, so there is nothing to --group-by")
    for number, text in enumerate(_standard_library_docstrings()[start[0] :], start=start[0]):
        yield Document(text, at=(number, 0))


@functools.cache
def _standard_library_docstrings() -> tuple[str, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or _OPTIONAL_MODULES.intersection(parts):
            continue
        if "tests" in parts or parts[0].startswith("_sysconfig"):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        found |= dict(_docstrings(module, path.read_bytes()))
    return tuple(found[name] for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()))


def _docstrings(module: str, source: bytes) -> Iterator[tuple[str, str]]:
    """(qualified name, documentation string) of a module, its classes and its functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in other people's strings
        tree = ast.parse(source)
    pending: list[tuple[str, ast.AST]] = [(module, tree)]
    while pending:
        name, node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= _DOCSTRING_CHARACTERS:
                yield name, text
        children = (child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))  # define nothing
        pending.extend((f"{name}.{getattr(child, 'name', '')}".rstrip("."), child) for child in children)


def _lines(handle: BinaryIO, start: Bookmark) -> Iterator[tuple[Bookmark, bytes]]:
    """Where each line of a file begins, and the line, without the mark that some editors put before the first."""
    byte, first = start
    handle.seek(byte)
    for number, whole in enumerate(handle, start=first):
        line = whole.removeprefix(_BOM) if byte == 0 else whole
        byte += len(whole) - len(line)
        yield (byte, number), line
        byte += len(line)


def _marked(found: Document | Fault, at: Bookmark) -> Document | Fault:
    return replace(found, at=at) if isinstance(found, Document) else found


def _group_of_file(place: str, options: ReadOptions) -> str:
    """The group of a file that has no columns: its folder's name, where that is asked for."""
    if options.group_by is None:
        return ALL_GROUP
    if options.group_by != BY_FOLDER:
        raise CorpusError(f"{place}: has no columns; --group-by {BY_FOLDER} takes the names of the files' folders")
    name = Path(place).resolve().parent.name
    return os.fsencode(name).decode("utf-8", "backslashreplace")  # a group is text, a folder's name may be any bytes


def _decode(place: str, data: bytes, at: Bookmark, group: str) -> Document | Fault:
    """Text of a .txt document."""
    try:
        return Document(data.decode("utf-8").replace("\r\n", "\n").strip("\n"), group, at)
    except UnicodeDecodeError as error:
        line = at[1] + 1 + data[: error.start].count(b"\n")
        wrong = data[error.start]
        return Fault(f"{place}:{line}: not UTF-8 (byte {at[0] + error.start} of the file is 0x{wrong:02x})")


def _from_json(where: str, line: bytes, options: ReadOptions) -> Document | Fault:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Fault(f"{where}: not UTF-8 (byte {error.start} of the line is 0x{line[error.start]:02x})")
    except (ValueError, RecursionError) as error:
        return Fault(f"{where}: not JSON ({error})")
    if not isinstance(record, dict):
        expected = f"a JSON object with the key {options.text_column!r}"
        return Fault(f"{where}: expected {expected}, got {type(record).__name__}")
    return _from_mapping(where, record, options)


def _from_mapping(where: str, record: Any, options: ReadOptions) -> Document | Fault:
    for column in options.columns:
        if column not in record:
            names = ", ".join(repr(name) for name in record) or "none"
            return Fault(f"{where}: no column {column!r}; there is {names} ({_chosen_with(column, options)})")
    return _document(where, [record[column] for column in options.columns], options)


def _from_row(where: str, row: list[str], expected: int, columns: list[int], options: ReadOptions) -> Document | Fault:
    if len(row) != expected:
        return Fault(f"{where}: expected {expected} columns as in the first row, got {len(row)}")
    if any(_has_surrogates(value) for value in row):
        return Fault(f"{where}: not UTF-8")
    return _document(where, [row[column] for column in columns], options)


def _from_scalars(where: str, scalars: Any, options: ReadOptions) -> Document | Fault:
    try:
        values = [scalar.as_py() for scalar in scalars]
    except UnicodeDecodeError:
        return Fault(f"{where}: not UTF-8")
    return _document(where, values, options)


def _document(where: str, values: list[Any], options: ReadOptions) -> Document | Fault:
    """A document of the values of `ReadOptions.columns`."""
    content = _content(where, values[0], options.text_column)
    if isinstance(content, Fault) or options.group_by is None:
        return content if isinstance(content, Fault) else Document(content)
    group = values[1]
    if not isinstance(group, (str, int, float)) or group == "":
        return Fault(f"{where}: expected the name of a group in {options.group_by!r}, got {group!r}")
    if _has_surrogates(str(group)):
        return Fault(f"{where}: the group in {options.group_by!r} holds half of a character (a lone surrogate)")
    return Document(content, str(group))


def _content(where: str, value: Any, column: str) -> Content | Fault:
    if isinstance(value, str):
        if _has_surrogates(value):
            return Fault(f"{where}: the text in {column!r} holds half of a character (a lone surrogate)")
        return value
    if isinstance(value, list) and all(type(token) is int and 0 <= token < _LONGEST_FIELD for token in value):
        return tuple(value)
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):  # an image of a dataset
        return bytes(value["bytes"])
    if hasattr(value, "save") and hasattr(value, "mode"):  # the same, opened by Pillow
        file = io.BytesIO()
        value.save(file, format="PNG")
        return file.getvalue()
    got = "a list of something else than token ids" if isinstance(value, list) else type(value).__name__
    return Fault(f"{where}: expected text in {column!r}, got {got}")


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _chosen_with(column: str, options: ReadOptions) -> str:
    return "choose with --text-column" if column == options.text_column else "choose with --group-by"


def _column(place: str, names: list[str], wanted: str, options: ReadOptions) -> int:
    if wanted not in names:
        present = ", ".join(repr(name) for name in names)
        raise CorpusError(f"{place}: no column {wanted!r}; there is {present} ({_chosen_with(wanted, options)})")
    if names.count(wanted) > 1:
        raise CorpusError(f"{place}: {names.count(wanted)} columns are called {wanted!r}; give each a name of its own")
    return names.index(wanted)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


READERS: dict[str, Callable[[str, ReadOptions, Bookmark], Iterator[Document | Fault]]] = {
    "txt": read_txt,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
    "dataset": read_dataset,
    "docstrings": read_docstrings,
    "image": read_image,
}

KIND_OF_SUFFIX = {".txt": "txt", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
KIND_OF_SUFFIX |= dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp"), "image")
