"""A run on disk: scan.json, heads.parquet, and while it is being made the finished shards under parts/.

Every file is written whole or not at all, and nothing that is read back is believed before its digest was checked.
Nothing here holds a time, a host or a process, so that a run is the same bytes however often it was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING, Any

from attncap.claims import Claims, is_held_alone, lock_file
from attncap.display import SmallMap, maps_html
from attncap.extras import require
from attncap.parts import TEMPORARY, Part, digest_of_file, whole_file, write_whole
from attncap.types import AttncapError

if TYPE_CHECKING:
    import pyarrow

TABLES = ("sequences", "rows")
"""Kinds of tables of single documents that a run may hold beside heads.parquet."""

ANALYSES = "analyses"
"""Folder of what `attncap analyse` adds to a finished run; a scan neither reads nor changes it."""

RUN_FORMAT = 3
"""Layout of a run folder; a run of another number is refused."""

HEADS_COLUMNS = (
    "layer",
    "module",
    "head",
    "stat",
    "group",
    "count",
    "mean",
    "std",
    "min",
    "max",
    "p05",
    "p50",
    "p95",
)

_OWN_DIGEST = "sha256"
_TEMPORARY_NAME = re.compile(r"(scan\.json|\w+\.parquet)(\.[0-9a-f]+)?\.tmp")
_PART_NAME = re.compile(r"((\d+(\.\w+)?|merged|survey)\.bin|worker-[0-9a-f]+\.json)(\.[0-9a-f]+\.tmp)?")


class RunError(AttncapError, RuntimeError):
    """A run folder cannot be used as it is; the message says what to do."""


class RunDamagedError(RunError):
    """scan.json or heads.parquet is not what a scan wrote.

    `content` is what can still be read of scan.json, and is not to be believed.
    """

    def __init__(self, message: str, content: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.content = content or {}


class RunMismatchError(RunError, ValueError):
    """The folder given for a run holds something else: another run, or files that are not a run."""


@dataclass(frozen=True)
class Run:
    """A finished scan, read back and verified.

    Attributes:
        path: the run's folder.
        heads: the table of ``heads.parquet``, columns `HEADS_COLUMNS`.
        scan: the content of ``scan.json``, less its digest.
    """

    path: Path
    heads: pyarrow.Table
    scan: dict[str, Any]

    def _repr_html_(self) -> str:
        """What a notebook shows: a heat map of means for each statistic, of the first group where there are several."""
        model, counts = self.scan.get("model") or {}, self.scan.get("counts") or {}
        columns = ("layer", "module", "head", "stat", "group", "mean")
        rows = list(zip(*(self.heads.column(name).to_pylist() for name in columns), strict=True))
        layers = sorted({(layer, module) for layer, module, *_ in rows})
        width = max((head + 1 for _, _, head, *_ in rows), default=0)
        grids: dict[str, list[list[float | None]]] = {}
        group = rows[0][4] if rows else ""
        for layer, module, head, stat, of, mean in rows:
            if of == group:
                grid = grids.setdefault(stat, [[None] * width for _ in layers])
                grid[layers.index((layer, module))][head] = mean
        note = f"{counts.get('documents', 0):,} documents, {counts.get('tokens', 0):,} tokens. Means"
        note += f" of group {group}" if group not in ("", "all") else ""
        note += "; rows are layers, columns heads."
        return maps_html(f"{model.get('name')} in {self.path}", note, [SmallMap(*one) for one in grids.items()])


def read_run(path: str | os.PathLike[str]) -> Run:
    """The finished run in the folder `path`.

    Raises:
        RunError: there is none, it is not finished, or heads.parquet is not what the scan wrote.
        MissingExtraError: pyarrow is not installed.
    """
    folder = RunFolder(Path(path))
    folder.check_kinds()
    scan = folder.read_scan()
    if scan is None:
        raise RunMismatchError(
            f"{path}: no run of attncap (no scan.json); make one with `attncap scan MODEL CORPUS -o {path}`"
        )
    if scan.get("status") != "complete":
        progress = scan.get("progress", {})
        done = f"{progress.get('shards_done', '?')} of {progress.get('shards_total', '?')} shards"
        raise RunError(f"{path}: the scan is not finished ({done}); the same `attncap scan` command finishes it")
    folder.check_heads(scan)
    # pyarrow's own threads buy nothing on a file this small and may abort the interpreter as it exits.
    file = require("pyarrow.parquet", "report").ParquetFile(folder.heads, pre_buffer=False)
    with file:
        return Run(path=folder.path, heads=file.read(use_threads=False), scan=scan)


class RunFolder:
    """The files of one run: where they lie, how they are written, how they are checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scan_json = path / "scan.json"
        self.heads = path / "heads.parquet"
        self.parts = path / "parts"
        self.merged = self.parts / "merged.bin"
        self.survey = self.parts / "survey.bin"
        self.lock_file = path / ".lock"
        self.claims_file = path / ".claims"

    def claims(self) -> Claims:
        """Claims on the parts of this run; only to be opened while the folder is locked."""
        return Claims(self.claims_file)

    def check_kinds(self) -> None:
        """Refuse a folder in the place of a file of a run, and the reverse.

        Raises:
            RunMismatchError: there is one.
        """
        for path, is_kind, kind in (
            (self.scan_json, S_ISREG, "file"),
            (self.heads, S_ISREG, "file"),
            (self.parts, S_ISDIR, "folder"),
            (self.lock_file, S_ISREG, "file"),
        ):
            try:
                mode = path.stat().st_mode
            except (FileNotFoundError, NotADirectoryError):  # or another worker has taken it away
                continue
            if not is_kind(mode):
                raise RunMismatchError(
                    f"{path}: a run has a {kind} there, this is something else; move it away or give another folder"
                )

    def check_usable(self) -> None:
        """Refuse a path where a run must not be written.

        Raises:
            RunMismatchError: it is a file, or a folder with content that is not a run or in the place of a run's own.
        """
        try:
            str(self.path).encode()
        except UnicodeEncodeError as error:
            raise RunMismatchError(
                f"{self.path}: the name is not UTF-8, and tables cannot be written there; give another folder with -o"
            ) from error
        if self.path.exists() and not self.path.is_dir():
            raise RunMismatchError(f"{self.path}: is a file; give a folder for the run with -o")
        self.check_kinds()
        if not self.path.is_dir() or self.scan_json.exists():
            return
        # What a run is made of without its scan.json: a scan was killed early, or the file was lost.
        known = {self.lock_file.name, self.claims_file.name, self.heads.name, self.parts.name, "report.html"}
        known |= {ANALYSES, *(self.table(kind).name for kind in TABLES)}
        foreign = sorted(
            entry.name
            for entry in self.path.iterdir()
            if entry.name not in known and not _TEMPORARY_NAME.fullmatch(entry.name)
        )
        if self.parts.is_dir():
            foreign += sorted(entry.name for entry in self.parts.iterdir() if not _PART_NAME.fullmatch(entry.name))
        if foreign:
            raise RunMismatchError(
                f"{self.path}: holds files but is not a run of attncap (it has {foreign[0]!r} and no scan.json); "
                "give a new or an empty folder with -o"
            )

    @property
    def is_read_only(self) -> bool:
        """Whether it is there and nothing in it may be written."""
        return self.path.is_dir() and not os.access(self.path, os.W_OK)

    @contextlib.contextmanager
    def lock(self, shared: bool = False) -> Iterator[None]:
        """Hold the folder alone, or with others that share it; made if it is not there.

        The lock dies with the process, however that ends. A folder that may not be written needs no lock.

        Raises:
            RunError: another process holds it, and one of the two does not share it.
        """
        if self.is_read_only:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = lock_file(self.lock_file, shared)
        if descriptor is None:
            raise RunError(f"{self.path}: another scan is writing it; wait or give another folder with -o")
        try:
            if not shared:
                self.remove_temporaries()
            yield
        finally:
            if is_held_alone(descriptor):
                for path in (self.claims_file, self.lock_file):
                    path.unlink(missing_ok=True)
            os.close(descriptor)

    def read_scan(self) -> dict[str, Any] | None:
        """scan.json less its digest, or None where there is none.

        Raises:
            RunDamagedError: it cannot be read, or its digest is not that of the rest.
            RunMismatchError: it is of another version of attncap.
        """
        damaged = f"{self.scan_json}: damaged"
        repair = "give the same `attncap scan` command again to make it anew"
        try:
            scan = json.loads(self.scan_json.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, RecursionError) as error:
            raise RunDamagedError(f"{damaged} ({error}); {repair}") from error
        if not isinstance(scan, dict):
            raise RunDamagedError(f"{damaged} (it is no JSON object); {repair}")
        if isinstance(scan.get("format"), int) and scan["format"] != RUN_FORMAT:
            raise RunMismatchError(
                f"{self.path}: a run of format {scan['format']}, this attncap reads and writes format {RUN_FORMAT}; "
                "give another folder"
            )
        if scan.pop(_OWN_DIGEST, None) != _digest(scan):
            raise RunDamagedError(f"{damaged} (its sha256 is not the one of what it says); {repair}", scan)
        return scan

    def write_scan(self, scan: Mapping[str, Any]) -> None:
        """Replace scan.json; the digest of its content is added."""
        whole = {**scan, _OWN_DIGEST: _digest(scan)}
        text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
        # A file's name may be no UTF-8, which Python holds as lone surrogates: written as JSON escapes them.
        write_whole(self.scan_json, text.encode("utf-8", "backslashreplace"))

    def part_path(self, shard: int) -> Path:
        """Where the result of a shard lies."""
        return self.parts / f"{shard:05d}.bin"

    def write_part(self, part: Part) -> None:
        """Add a finished shard."""
        self.parts.mkdir(exist_ok=True)
        write_whole(self.part_path(part.shard), part.to_bytes())

    def write_merged(self, part: Part) -> None:
        """Replace the summary of all shards before `part.shard`, and drop those shards."""
        self.parts.mkdir(exist_ok=True)
        write_whole(self.merged, part.to_bytes())
        self.remove_parts_before(part.shard)

    def read_merged(self, digest_of: Callable[[int], str]) -> Part | None:
        """The summary of all shards before its `shard`; None where there is none or it is damaged.

        Args:
            digest_of: number of shards -> the digest that a summary of so many must have.
        """
        part = Part.read(self.merged)
        return part if part is not None and part.digest == digest_of(part.shard) else None

    def table(self, kind: str) -> Path:
        """Where a table of single documents lies."""
        return self.path / f"{kind}.parquet"

    def table_part_path(self, kind: str, shard: int) -> Path:
        """Where a shard's share of such a table lies."""
        return self.parts / f"{shard:05d}.{kind}.bin"

    def write_table_part(self, kind: str, part: Part) -> None:
        """Add a shard's share of a table."""
        self.parts.mkdir(exist_ok=True)
        write_whole(self.table_part_path(kind, part.shard), part.to_bytes())

    def read_table_part(self, kind: str, shard: int, digest: str) -> Part | None:
        """A shard's share of a table; None where there is none or the file is damaged or of another input."""
        part = Part.read(self.table_part_path(kind, shard))
        return part if part is not None and (part.shard, part.digest) == (shard, digest) else None

    def shards_with_table(self, kind: str) -> set[int]:
        """Shards whose share of a table is there; contents are not looked at."""
        return {int(path.name.partition(".")[0]) for path in self.parts.glob(f"*.{kind}.bin")}

    def write_table(self, kind: str, write: Callable[[Path], None]) -> str:
        """Have a table written, whole or not at all; gives its sha256."""
        with whole_file(self.table(kind)) as temporary:
            write(temporary)
        return digest_of_file(self.table(kind))

    def tables_are_intact(self, scan: Mapping[str, Any]) -> bool:
        """Whether the tables of single documents are the files that scan.json speaks of."""
        kept = scan.get("tables_sha256", {})
        return all(self.table(kind).is_file() and digest_of_file(self.table(kind)) == kept[kind] for kind in kept)

    def write_survey(self, part: Part) -> None:
        """Keep what a pass over the corpus found."""
        self.parts.mkdir(exist_ok=True)
        write_whole(self.survey, part.to_bytes())

    def read_survey(self, digest: str) -> Part | None:
        """What an earlier pass over the same files found; None where there is none."""
        part = Part.read(self.survey)
        return part if part is not None and part.digest == digest else None

    def finished_shards(self) -> set[int]:
        """Shards whose result is there, by itself or in the merged summary; contents are not looked at."""
        # In this order: a shard leaves its own file only after the summary that holds it was written.
        names = [path.stem for path in self.parts.glob("*.bin")]
        return {int(name) for name in names if name.isdigit()} | set(range(self.merged_shards()))

    def merged_shards(self) -> int:
        """How many shards the merged summary says that it holds."""
        try:
            with open(self.merged, "rb") as handle:
                return Part.shard_of(handle)
        except FileNotFoundError:
            return 0

    def remove_parts_before(self, shard: int) -> None:
        """Drop the shards that the merged summary holds."""
        for path in self.parts.glob("*.bin"):
            if path.stem.isdigit() and int(path.stem) < shard:
                path.unlink(missing_ok=True)

    def read_part(self, shard: int, digest: str) -> Part | None:
        """The result of a shard; None where there is none or the file is damaged or of another input."""
        part = Part.read(self.part_path(shard))
        return part if part is not None and (part.shard, part.digest) == (shard, digest) else None

    def write_heads(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Write heads.parquet; gives its sha256."""
        data = heads_bytes(rows)
        write_whole(self.heads, data)
        return hashlib.sha256(data).hexdigest()

    def heads_are_intact(self, scan: Mapping[str, Any]) -> bool:
        """Whether heads.parquet is the file that scan.json speaks of."""
        try:
            data = self.heads.read_bytes()
        except FileNotFoundError:
            return False
        return hashlib.sha256(data).hexdigest() == scan.get("heads_sha256")

    def check_heads(self, scan: Mapping[str, Any]) -> None:
        """Refuse a finished run whose heads.parquet is not the file that scan.json speaks of.

        Raises:
            RunDamagedError: it is missing or another.
        """
        if not self.heads_are_intact(scan):
            raise RunDamagedError(
                f"{self.heads}: missing or damaged (its sha256 is not the one in scan.json); "
                "give the same `attncap scan` command again to recompute it"
            )

    def remove_parts(self) -> None:
        """Drop the shards, which a finished run no longer needs."""
        with contextlib.suppress(OSError):  # there is none, it may not be written, or someone's own file is in it
            for path in self.parts.iterdir():
                if _PART_NAME.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            self.parts.rmdir()

    def remove_temporaries(self) -> None:
        """Drop what killed processes were writing; only called while no other process writes."""
        for folder, name in ((self.path, _TEMPORARY_NAME), (self.parts, _PART_NAME)):
            for leftover in folder.glob("*" + TEMPORARY):
                if name.fullmatch(leftover.name):
                    leftover.unlink(missing_ok=True)


def _digest(scan: Mapping[str, Any]) -> str:
    """sha256 of what scan.json says, however it is laid out."""
    return hashlib.sha256(json.dumps(scan, sort_keys=True).encode()).hexdigest()


def heads_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """heads.parquet as bytes: the same rows give the same bytes."""
    parquet, pyarrow = require("pyarrow.parquet", "scan"), require("pyarrow", "scan")
    text, real = pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.float64()
    types = {"layer": pyarrow.int32(), "head": pyarrow.int32(), "count": pyarrow.int64()}
    types |= dict.fromkeys(("module", "stat", "group"), text)
    schema = pyarrow.schema([(name, types.get(name, real)) for name in HEADS_COLUMNS])
    table = pyarrow.Table.from_pylist([dict(row) for row in rows], schema=schema)
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
