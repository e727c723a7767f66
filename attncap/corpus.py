"""Corpora: what to read, document by document, without ever holding more than one shard of it.

A corpus is read twice: once to count it and take its fingerprint (`survey`), once for the documents (`shards`).
What is kept in between is a digest of each shard, and where it begins: a worker goes to its shards without reading the
others.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from attncap import corpus_readers
from attncap.corpus_readers import (
    ALL_GROUP,
    BEGINNING,
    DATASET_PREFIX,
    Content,
    CorpusError,
    Document,
    Fault,
    ReadOptions,
)
from attncap.types import MissingExtraError

__all__ = ["Corpus", "CorpusError", "CorpusOptions", "Shard", "ShardSize", "Survey"]

BUILTIN_DOCSTRINGS = "builtin:docstrings"
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.\[\]%-]+)?")
_FAULTS_KEPT = 10
_CHARACTERS_OF_A_TOKEN = 4
_CHARACTERS_OF_AN_IMAGE = 1024
MOST_GROUPS = 256
"""Each group takes the memory of a whole summary."""
_FILES = frozenset(corpus_readers.KIND_OF_SUFFIX.values())


class MissingDatasetsError(CorpusError, MissingExtraError):
    """A source is no file, and the package that could load it as a dataset is not installed."""


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is read.

    Attributes:
        text_column: column or key that holds the text in .jsonl, .csv, .tsv, .parquet and datasets; or token ids (a
            list of whole numbers, taken as they are), or images (the bytes of a file).
        txt_documents: a document of a .txt file is a "paragraph" (between blank lines) or the whole "file".
        on_error: at a document that cannot be read, "skip" and count it, or "stop".
        limit: read no more than this many documents; None = all.
        group_by: column whose value is the group of a document; "folder" for the name of the folder of files without
            columns; None = one group.
    """

    text_column: str = "text"
    txt_documents: str = "paragraph"
    on_error: str = "skip"
    limit: int | None = None
    group_by: str | None = None

    def __post_init__(self) -> None:
        if self.txt_documents not in ("paragraph", "file"):
            raise ValueError(f"txt_documents: expected paragraph or file, got {self.txt_documents!r}")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error: expected stop or skip, got {self.on_error!r}")
        if self.limit is not None and type(self.limit) is not int:
            raise TypeError(f"limit: expected an int, got {self.limit!r}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected at least 1 document, got {self.limit}")


@dataclass(frozen=True)
class ShardSize:
    """Where a corpus is cut: a shard ends with the document that brings it to one of these.

    A document counts for at most `longest` characters, for models cut what is longer.
    """

    documents: int = 256
    characters: int = 24 * 1024
    longest: int = 8 * 1024


Start = tuple[int, int, int]
"""Where to read on: the number of an input, and a bookmark in it."""

_BEGINNING: Start = (0, *BEGINNING)


@dataclass(frozen=True)
class Survey:
    """What one pass over the corpus found.

    Attributes:
        documents: number of documents with text.
        empty: documents that are empty or white space, which are left out.
        failed: documents that could not be read (only with on_error="skip").
        fingerprint: sha256 of the documents in order, and of the options they were read with.
        shard_digests: sha256 of each shard's documents.
        shard_documents: how many documents each shard has.
        shard_starts: where the first of them is: the number of the input, and its bookmark there.
        groups: how many documents each group has, by name.
        faults: the first messages about failed documents.
    """

    documents: int
    empty: int
    failed: int
    fingerprint: str
    shard_digests: tuple[bytes, ...]
    shard_documents: tuple[int, ...]
    shard_starts: tuple[Start, ...]
    groups: dict[str, int]
    faults: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Everything, in a form that `from_bytes` reads."""
        fields = {**asdict(self), "shard_digests": [digest.hex() for digest in self.shard_digests]}
        return json.dumps(fields).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Survey:
        """What `to_bytes` wrote."""
        fields = json.loads(data)
        fields["shard_digests"] = tuple(bytes.fromhex(digest) for digest in fields["shard_digests"])
        fields["shard_starts"] = tuple(tuple(start) for start in fields["shard_starts"])
        return cls(**{**fields, **{name: tuple(fields[name]) for name in ("shard_documents", "faults")}})


@dataclass(frozen=True)
class Shard:
    """Consecutive documents of the corpus, the `first` of them by its number; both count from 0."""

    index: int
    first: int
    documents: list[Document]

    @property
    def texts(self) -> list[Content]:
        """Contents of the documents."""
        return [document.content for document in self.documents]


@dataclass
class _Tally:
    empty: int = 0
    failed: int = 0
    faults: list[str] = field(default_factory=list)


class Corpus:
    """Documents of several sources, in the order given; files of a folder or a glob in the order of their names.

    A file that is named several times is read once.

    Args:
        sources: files (.txt, .jsonl, .csv, .tsv, .parquet, images), folders, globs, Hugging Face datasets (an id,
            ``name`` or ``name:split``, a folder that `save_to_disk` wrote, or anything that `load_dataset` takes
            behind ``dataset:``), or ``builtin:docstrings``.
        options: how they are read.

    Raises:
        TypeError: `sources` is no list of names.
        CorpusError: a source is missing, or a folder or glob holds no file that can be read.
        MissingExtraError: a source needs a package that is not installed.
    """

    def __init__(self, sources: Sequence[str | os.PathLike[str]], options: CorpusOptions = CorpusOptions()) -> None:
        if not isinstance(sources, Sequence) or isinstance(sources, (str, bytes)):
            raise TypeError(f"CORPUS: expected a list of files, folders or datasets, got {sources!r}")
        for source in sources:
            if not isinstance(source, (str, os.PathLike)):
                raise TypeError(f"CORPUS: expected the name of a file, a folder or a dataset, got {source!r}")
        if not sources:
            raise CorpusError("CORPUS: expected at least one file, folder, dataset id or builtin:docstrings")
        self.sources = tuple(str(source) for source in sources)
        self.options = options
        named = [one for source in self.sources for one in _found(source)]
        once: dict[str, tuple[str, str]] = {}
        for kind, place in named:
            once.setdefault(os.path.realpath(place) if kind in _FILES else place, (kind, place))
        self._inputs = list(once.values())

    def survey(self, size: ShardSize = ShardSize()) -> Survey:
        """Count and fingerprint the corpus, cut into shards.

        Raises:
            CorpusError: a document cannot be read and on_error is "stop", or there is no document at all.
        """
        tally = _Tally()
        whole = hashlib.sha256(repr(sorted(asdict(self.options).items())).encode())
        digests: list[bytes] = []
        numbers: list[int] = []
        starts: list[Start] = []
        groups: dict[str, int] = {}
        for found in _cut(self._documents(tally), size):
            documents = [document for _, document in found]
            digests.append(_digest(documents))
            numbers.append(len(documents))
            starts.append(found[0][0])
            whole.update(digests[-1])
            for document in documents:
                groups[document.group] = groups.get(document.group, 0) + 1
            if len(groups) > MOST_GROUPS:
                raise CorpusError(
                    f"--group-by {self.options.group_by}: more than {MOST_GROUPS} groups, as {document.group!r}"
                )
        if not numbers:
            raise CorpusError(self._emptiness(tally))
        return Survey(
            documents=sum(numbers),
            empty=tally.empty,
            failed=tally.failed,
            fingerprint=whole.hexdigest(),
            shard_digests=tuple(digests),
            shard_documents=tuple(numbers),
            shard_starts=tuple(starts),
            groups=dict(sorted(groups.items())),
            faults=tuple(tally.faults),
        )

    def shards(
        self,
        survey: Survey,
        wanted: Collection[int] | None = None,
        take: Callable[[int], bool] = lambda shard: True,
    ) -> Iterator[Shard]:
        """Shards of the corpus in order, each checked against the survey.

        Args:
            wanted: numbers of shards; None = all.
            take: asked before a shard is read; it is left out where this says no.

        Raises:
            CorpusError: the corpus is not what it was when it was surveyed.
        """
        firsts = [0, *itertools.accumulate(survey.shard_documents)]
        documents: Iterator[tuple[Start, Document]] = iter(())
        reached = -1  # the shard that `documents` goes on with
        for index in range(len(survey.shard_digests)) if wanted is None else sorted(wanted):
            if not take(index):
                continue
            if index != reached:
                documents = self._documents(_Tally(), survey.shard_starts[index])
            found = [document for _, document in itertools.islice(documents, survey.shard_documents[index])]
            yield self._checked(Shard(index, firsts[index], found), survey)
            reached = index + 1

    def state(self) -> str | None:
        """Digest of the files' names, sizes and times of change and of the options; None where not all are files.

        Equal states are one corpus to read; the times are compared with each other, never with a clock.
        """
        digest = hashlib.sha256(repr(sorted(asdict(self.options).items())).encode())
        for kind, place in self._inputs:
            if kind not in _FILES:
                return None
            file = os.stat(place)
            digest.update(os.fsencode(f"{kind} {os.path.realpath(place)} {file.st_size} {file.st_mtime_ns}\n"))
        return digest.hexdigest()

    def _checked(self, shard: Shard, survey: Survey) -> Shard:
        if _digest(shard.documents) != survey.shard_digests[shard.index]:
            raise self._changed()
        return shard

    def _changed(self) -> CorpusError:
        return CorpusError(
            f"{', '.join(self.sources)}: changed while it was being read; "
            "put it back and give the same command again, or scan it into another folder"
        )

    def _documents(self, tally: _Tally, start: Start = _BEGINNING) -> Iterator[tuple[Start, Document]]:
        """Documents with text and where they are; the empty and the failed go to the tally."""
        count = 0
        for number, document in self._read(start):
            if isinstance(document, Fault):
                if self.options.on_error == "stop":
                    raise CorpusError(
                        f"{document.message}; without --on-error stop such documents are left out and counted"
                    )
                tally.failed += document.documents
                if len(tally.faults) < _FAULTS_KEPT:
                    tally.faults.append(document.message)
            elif not (document.content.strip() if isinstance(document.content, str) else document.content):
                tally.empty += 1
            else:
                yield (number, *document.at), document
                count += 1
                if count == self.options.limit:
                    return

    def _read(self, start: Start) -> Iterator[tuple[int, Document | Fault]]:
        """What the inputs hold, each with the number of its input."""
        whole_files = self.options.txt_documents == "file"
        options = ReadOptions(self.options.text_column, whole_files, self.options.group_by)
        first, *bookmark = start
        for number, (kind, place) in enumerate(self._inputs[first:], start=first):
            at = (bookmark[0], bookmark[1]) if number == first else BEGINNING
            for document in corpus_readers.READERS[kind](place, options, at):
                yield number, document

    def _emptiness(self, tally: _Tally) -> str:
        message = f"{', '.join(self.sources)}: no document with text in it"
        if tally.empty:
            message += f"; {tally.empty} empty or white space only"
        if tally.failed:
            message += f"; {tally.failed} could not be read, the first: {tally.faults[0]}"
        return message


def _cut(documents: Iterator[tuple[Start, Document]], size: ShardSize) -> Iterator[list[tuple[Start, Document]]]:
    shard: list[tuple[Start, Document]] = []
    characters = 0
    for place, document in documents:
        shard.append((place, document))
        characters += min(_characters(document.content), size.longest)
        if len(shard) >= size.documents or characters >= size.characters:
            yield shard
            shard, characters = [], 0
    if shard:
        yield shard


def _characters(content: Content) -> int:
    """Length of a text, or of one that would be about as much work."""
    if isinstance(content, str):
        return len(content)
    return _CHARACTERS_OF_AN_IMAGE if isinstance(content, bytes) else _CHARACTERS_OF_A_TOKEN * len(content)


def _digest(documents: Sequence[Document]) -> bytes:
    """sha256 of documents; the length of each goes first, so that no two lists run into the same bytes."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.content
        if isinstance(content, tuple):
            digest.update(b"token ids")
            content = b"".join(token.to_bytes(4, "little") for token in content)
        for part in (content,) if document.group == ALL_GROUP else (content, document.group):
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.digest()


def _found(source: str) -> list[tuple[str, str]]:
    """See `_resolve`; a name that the system does not take, or not from this user, is a name that is wrong."""
    try:
        return _resolve(source)
    except OSError as error:
        raise CorpusError(
            f"{source}: cannot be looked for ({error.strerror}); check the name and its permissions"
        ) from error


def _resolve(source: str) -> list[tuple[str, str]]:
    """(kind of reader, place) of everything that a source names."""
    if not source:
        raise CorpusError("CORPUS: expected the name of a file, a folder or a dataset, got ''")
    path = Path(source)
    if source == BUILTIN_DOCSTRINGS:
        return [("docstrings", source)]
    if source.startswith("builtin:"):
        raise CorpusError(f"CORPUS: no built-in corpus {source!r}; there is {BUILTIN_DOCSTRINGS}")
    if source.startswith(DATASET_PREFIX) or corpus_readers.is_saved_dataset(path):
        return [_dataset(source)]
    if path.is_dir():
        return _files(source, _walk(path))
    if path.exists():
        return _files(source, [path])
    if glob.has_magic(source):
        matches = sorted(Path(match) for match in glob.glob(source, recursive=True))
        return _files(source, _one_sort([match for match in matches if match.is_file()]))
    return [_dataset(source)]


def _walk(folder: Path) -> list[Path]:
    """Files with a known ending under a folder, by name; hidden ones are left out."""
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in corpus_readers.KIND_OF_SUFFIX
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return _one_sort(sorted(found, key=lambda path: path.relative_to(folder).as_posix()))


def _one_sort(paths: Sequence[Path]) -> list[Path]:
    """The files, less images where there are others: a text that has pictures is a text."""
    others = [path for path in paths if corpus_readers.KIND_OF_SUFFIX.get(path.suffix.lower()) != "image"]
    return others or list(paths)


def _files(source: str, paths: Sequence[Path]) -> list[tuple[str, str]]:
    known = corpus_readers.KIND_OF_SUFFIX
    if not paths:
        raise CorpusError(f"{source}: no {', '.join(known)} file there")
    for path in paths:
        if path.suffix.lower() not in known:
            raise CorpusError(f"{path}: expected a file that ends in {', '.join(known)}")
        if not path.is_file():
            raise CorpusError(f"{path}: expected a file that can be read twice, as a pipe cannot")
        if not os.access(path, os.R_OK):
            raise CorpusError(f"{path}: may not be read; check its permissions")
    return [(known[path.suffix.lower()], str(path)) for path in paths]


def _dataset(source: str) -> tuple[str, str]:
    is_id = Path(source).suffix.lower() not in corpus_readers.KIND_OF_SUFFIX and _DATASET_ID.fullmatch(source)
    if not is_id and not source.startswith(DATASET_PREFIX) and not Path(source).is_dir():
        raise CorpusError(f"{source}: no such file or folder")
    if importlib.util.find_spec("datasets") is None:
        raise MissingDatasetsError(
            f"{source}: no such file or folder. If it is the id of a Hugging Face dataset, "
            'pip install "attncap[datasets]" lets attncap load it'
        )
    return "dataset", source
