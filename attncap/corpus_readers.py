"""Readers: one generator per kind of source, each giving documents in order and a Fault where one cannot be read."""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from attncap.extras import require
from attncap.types import AttncapError

_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 1024
_LONGEST_FIELD = 2**31 - 1

# One-line docstrings say little about attention; what remains are some hundreds of paragraphs of English and code.
_DOCSTRING_CHARACTERS = 400
# Left out by some distributors of Python, so that a corpus with them would differ from machine to machine.
_OPTIONAL_MODULES = frozenset(
    ("antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "test", "this", "tkinter", "turtle", "turtledemo")
)


class CorpusError(AttncapError, ValueError):
    """A corpus cannot be read; the message names the file and the place in it."""


@dataclass(frozen=True)
class Fault:
    """A document that cannot be read, and why."""

    message: str


@dataclass(frozen=True)
class ReadOptions:
    """Column that holds the text; whether a .txt file is one document."""

    text_column: str
    whole_files: bool


def read_txt(place: str, options: ReadOptions) -> Iterator[str | Fault]:
    """Paragraphs between blank lines, or the whole file."""
    with open(place, "rb") as handle:
        if options.whole_files:
            yield _decode(place, handle.read().removeprefix(_BOM), 1, 0)
            return
        lines: list[bytes] = []
        start_line, start_byte, position = 1, 0, 0
        for number, line in enumerate(_lines(handle), start=1):
            if line.strip():
                if not lines:
                    start_line, start_byte = number, position
                lines.append(line)
            elif lines:
                yield _decode(place, b"".join(lines), start_line, start_byte)
                lines = []
            position += len(line)
        if lines:
            yield _decode(place, b"".join(lines), start_line, start_byte)


def read_jsonl(place: str, options: ReadOptions) -> Iterator[str | Fault]:
    """One JSON object a line; lines without anything on them are no documents."""
    with open(place, "rb") as handle:
        for number, line in enumerate(_lines(handle), start=1):
            if line.strip():
                yield _from_json(f"{place}:{number}", line, options.text_column)


def read_csv(place: str, options: ReadOptions) -> Iterator[str | Fault]:
    """Comma-separated values (tab-separated in .tsv) with the names of the columns in the first row."""
    csv.field_size_limit(_LONGEST_FIELD)
    separator = "\t" if place.lower().endswith(".tsv") else ","
    with open(place, "rb") as handle:
        # Bytes that are not UTF-8 pass through as lone surrogates, so that the fault names the row they stand in.
        rows = csv.reader(
            (line.decode("utf-8", "surrogateescape") for line in _lines(handle)), delimiter=separator, strict=True
        )
        try:
            header = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise CorpusError(f"{place}:1: not a row of names of columns ({error})") from error
        column = _column(place, header, options.text_column)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Fault(f"{place}:{rows.line_num}: broken row ({error})")
                continue
            if row:
                yield _from_row(f"{place}:{rows.line_num}", row, len(header), column)


def read_parquet(place: str, options: ReadOptions) -> Iterator[str | Fault]:
    """A column of a Parquet file, a batch of rows at a time."""
    parquet, pyarrow = require("pyarrow.parquet", "scan"), require("pyarrow", "scan")

    try:
        # Threads of pyarrow's own buy nothing here and may abort the interpreter as it exits.
        file = parquet.ParquetFile(place, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        yield Fault(f"{place}: not a Parquet file that can be read ({_first_line(error)})")
        return
    with file:
        _column(place, file.schema_arrow.names, options.text_column)
        number = 0
        batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=[options.text_column], use_threads=False)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (pyarrow.ArrowException, OSError) as error:
                yield Fault(f"{place}: damaged after row {number} ({_first_line(error)})")
                return
            for scalar in batch.column(0):
                number += 1
                yield _from_scalar(f"{place}: row {number}", scalar, options.text_column)


def read_dataset(place: str, options: ReadOptions) -> Iterator[str | Fault]:
    """A Hugging Face dataset, streamed; ``name:split`` chooses the split, which is train otherwise."""
    datasets = require("datasets", "datasets")
    name, _, split = place.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the library raises its own, the network's and the file system's
        raise CorpusError(f"{place}: cannot be loaded as a dataset ({_first_line(error)})") from error
    for number, row in enumerate(rows, start=1):
        yield _from_mapping(f"{place}: row {number}", row, options.text_column)


def read_docstrings(place: str, options: ReadOptions) -> Iterator[str | Fault]:
    """Documentation strings of Python's standard library, of 400 characters or more.

    Taken from the sources, no module is imported. The order is that of a digest of their names: any first part of it
    is a fair sample.
    """
    yield from _standard_library_docstrings()


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
        children = ast.iter_child_nodes(node)
        pending.extend((f"{name}.{getattr(child, 'name', '')}".rstrip("."), child) for child in children)


def _lines(handle: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, without the mark that some editors put before the first."""
    for number, line in enumerate(handle):
        yield line.removeprefix(_BOM) if number == 0 else line


def _decode(place: str, data: bytes, line: int, byte: int) -> str | Fault:
    """Text of a .txt document that begins at that line and byte of its file."""
    try:
        return data.decode("utf-8").replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError as error:
        at_line = line + data[: error.start].count(b"\n")
        wrong = data[error.start]
        return Fault(f"{place}:{at_line}: not UTF-8 (byte {byte + error.start} of the file is 0x{wrong:02x})")


def _from_json(where: str, line: bytes, column: str) -> str | Fault:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Fault(f"{where}: not UTF-8 (byte {error.start} of the line is 0x{line[error.start]:02x})")
    except (ValueError, RecursionError) as error:
        return Fault(f"{where}: not JSON ({error})")
    if not isinstance(record, dict):
        return Fault(f"{where}: expected a JSON object with the key {column!r}, got {type(record).__name__}")
    return _from_mapping(where, record, column)


def _from_mapping(where: str, record: Any, column: str) -> str | Fault:
    if column not in record:
        names = ", ".join(repr(name) for name in record) or "none"
        return Fault(f"{where}: no column {column!r}; there is {names} (choose with --text-column)")
    return _checked(where, record[column], column)


def _from_row(where: str, row: list[str], expected: int, column: int) -> str | Fault:
    if len(row) != expected:
        return Fault(f"{where}: expected {expected} columns as in the first row, got {len(row)}")
    if any(_has_surrogates(value) for value in row):
        return Fault(f"{where}: not UTF-8")
    return row[column]


def _from_scalar(where: str, scalar: Any, column: str) -> str | Fault:
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:
        return Fault(f"{where}: not UTF-8")
    return _checked(where, value, column)


def _checked(where: str, value: Any, column: str) -> str | Fault:
    if not isinstance(value, str):
        return Fault(f"{where}: expected text in {column!r}, got {type(value).__name__}")
    if _has_surrogates(value):
        return Fault(f"{where}: the text in {column!r} holds half of a character (a lone surrogate)")
    return value


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _column(place: str, names: list[str], wanted: str) -> int:
    if wanted not in names:
        present = ", ".join(repr(name) for name in names)
        raise CorpusError(f"{place}: no column {wanted!r}; there is {present} (choose with --text-column)")
    return names.index(wanted)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


READERS: dict[str, Callable[[str, ReadOptions], Iterator[str | Fault]]] = {
    "txt": read_txt,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
    "dataset": read_dataset,
    "docstrings": read_docstrings,
}

KIND_OF_SUFFIX = {".txt": "txt", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
