"""What a run's tables of single documents add to its report: distributions, profiles, examples of text.

With rows.parquet (``--keep rows``) a value is that of one query row, and profiles run over positions; with
sequences.parquet alone it is a document's mean, and profiles run over the length of documents. Tables are read a
piece at a time, so that memory grows with the number of heads and not with the corpus.

    S statistics   L layers   H heads   T tokens   K keys of a row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attncap.extras import require
from attncap.parts import digest_of_file
from attncap.report.content import Report
from attncap.report.examples import Example, ExampleReader, Receivers
from attncap.report.glossary import PROBABILITY
from attncap.store import Run, RunError, RunFolder

BINS = 24
"""Of a distribution; what lies beyond its ends is counted in the first and the last."""

TOKENS, DOCUMENTS = "tokens", "documents"
POSITION, LENGTH = "position in the document", "length of the document"
_BATCH = 1 << 16

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Distributions:
    """How the values of each head are spread.

    Attributes:
        of: what a value is of, "tokens" or "documents".
        ends: (S, 2) low and high end; between them BINS bins of equal width.
        shares: (S, L, H, BINS) share of the values in each bin; 0 where there are none.
    """

    of: str
    ends: Array
    shares: Array


@dataclass(frozen=True, eq=False)
class Profiles:
    """How a head's mean changes with the position of the row, or with the length of the document.

    Attributes:
        over: "position in the document" or "length of the document", in tokens.
        edges: (B + 1,) bins from edges[i] to edges[i + 1] - 1; they widen as they go.
        means: (S, L, H, B); NaN where a bin is empty.
    """

    over: str
    edges: NDArray[np.int64]
    means: Array


@dataclass(frozen=True, eq=False)
class Details:
    """Everything that the tables of single documents add. `stats` are those of the report that the tables have."""

    stats: tuple[str, ...]
    distributions: Distributions
    profiles: Profiles
    examples: tuple[Example, ...]
    receivers: Receivers | None


def read_details(run: Run, report: Report) -> Details | None:
    """What the tables of a run add to its report; None where it has none.

    Raises:
        RunError: a table is damaged.
    """
    folder = RunFolder(run.path)
    kept = run.scan.get("tables_sha256") or {}
    there = {
        kind: folder.table(kind) for kind in ("rows", "sequences") if kind in kept and folder.table(kind).is_file()
    }
    if not there or not report.layers:
        return None
    kind, path = next(iter(there.items()))
    if digest_of_file(path) != kept[kind]:
        raise RunError(
            f"{path}: damaged (its sha256 is not the one in scan.json); give the same `attncap scan` command again to "
            "recompute it, or delete the file for a report without it"
        )
    table = _Table(path, report)
    examples = ExampleReader(table.columns_of_documents(), report, str((run.scan.get("model") or {}).get("name", "")))
    sums = _Sums(table, report)
    for batch in table.batches():
        sums.add(batch)
        examples.add(batch)
    return Details(table.stats, sums.distributions(), sums.profiles(), examples.examples(), examples.receivers())


class _Table:
    """A table of rows or of sequences, a piece at a time; every piece has "place", the flat index of its head."""

    def __init__(self, path: Path, report: Report) -> None:
        self._parquet = require("pyarrow.parquet", "report")
        self._path = path
        self._shape = len(report.layers), report.heads
        self._rows = {layer.module: row for row, layer in enumerate(report.layers)}
        self._names = self._parquet.read_schema(path).names
        self.of_rows = "position" in self._names
        self.stats = tuple(name for name in report.stats if name in self._names)
        self.axis = "position" if self.of_rows else "tokens"

    def batches(self) -> Iterator[dict[str, NDArray[Any]]]:
        """All rows: the statistics, the axis of the profiles, and of rows what examples are made of."""
        examples = ("position", "topk_index", "topk_prob") if self.of_rows else ()
        wanted = dict.fromkeys((*self.stats, self.axis, "document", *examples))
        yield from self._read([name for name in wanted if name in self._names])

    def columns_of_documents(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Documents and their tokens, once each: what the first head of the first call says."""
        if not self.of_rows:
            return
        first = None
        for batch in self._read(["document", "position", "token", "group", "call"]):
            first = batch["place"][0] if first is None else first
            chosen = (batch["place"] == first) & (batch["call"] == 0)
            yield {name: column[chosen] for name, column in batch.items()}

    def longest(self) -> int:
        """Largest number on the axis of the profiles."""
        return max((int(batch[self.axis].max()) for batch in self._read([self.axis])), default=0)

    def _read(self, columns: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
        with self._parquet.ParquetFile(self._path, pre_buffer=False) as file:
            for batch in file.iter_batches(_BATCH, columns=["module", "head", *columns], use_threads=False):
                found = {name: _numpy(batch.column(name)) for name in columns}
                found["place"] = self._places(batch)
                known = found["place"] >= 0
                yield found if known.all() else {name: column[known] for name, column in found.items()}

    def _places(self, batch: Any) -> NDArray[np.int64]:
        modules = batch.column("module")
        rows = np.array([self._rows.get(name, -1) for name in modules.dictionary.to_pylist()], dtype=np.int64)
        row = rows[modules.indices.to_numpy()]
        places: NDArray[np.int64] = np.where(row < 0, -1, row * self._shape[1] + batch.column("head").to_numpy())
        return places


def _numpy(column: Any) -> NDArray[Any]:
    """A column as numbers or names; lists of one length as two dimensions."""
    if hasattr(column, "dictionary"):
        names: NDArray[Any] = np.array(column.dictionary.to_pylist(), dtype=object)
        return np.asarray(names[column.indices.to_numpy()])
    if hasattr(column, "flatten") and str(column.type).startswith("list"):
        return np.asarray(column.flatten().to_numpy()).reshape(len(column), -1)
    return np.asarray(column.to_numpy())


class _Sums:
    """Counts of the distributions and sums of the profiles."""

    def __init__(self, table: _Table, report: Report) -> None:
        self._table = table
        self._shape = (len(report.layers), report.heads)
        heads = len(report.layers) * report.heads
        self._ends = np.array([_ends(report, stat) for stat in table.stats]).reshape(-1, 2)
        self._edges = _edges(table.longest() + 1)
        bins = len(self._edges) - 1
        self._counts = np.zeros((len(table.stats), heads * BINS))
        self._totals, self._numbers = (np.zeros((len(table.stats), heads * bins)) for _ in range(2))

    def add(self, batch: Mapping[str, NDArray[Any]]) -> None:
        """Take a piece of the table."""
        bins = len(self._edges) - 1
        where = np.searchsorted(self._edges, batch[self._table.axis], side="right") - 1
        for index, stat in enumerate(self._table.stats):
            values = batch[stat].astype(np.float64)
            known = np.isfinite(values)
            values, place = values[known], batch["place"][known]
            low, high = self._ends[index]
            share = np.clip((values - low) / (high - low), 0.0, 1.0)
            bin_ = np.minimum((share * BINS).astype(np.int64), BINS - 1)
            self._counts[index] += np.bincount(place * BINS + bin_, minlength=self._counts.shape[1])
            place = place * bins + where[known]
            self._totals[index] += np.bincount(place, values, self._totals.shape[1])
            self._numbers[index] += np.bincount(place, minlength=self._numbers.shape[1])

    def distributions(self) -> Distributions:
        """How values are spread."""
        counts = self._counts.reshape(-1, *self._shape, BINS)
        shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
        return Distributions(TOKENS if self._table.of_rows else DOCUMENTS, self._ends, shares)

    def profiles(self) -> Profiles:
        """How means change."""
        means = np.full(self._totals.shape, np.nan)
        np.divide(self._totals, self._numbers, out=means, where=self._numbers > 0)
        whole = means.reshape(len(means), *self._shape, -1)
        used = np.flatnonzero(np.isfinite(whole).any((0, 1, 2)))
        first = int(used[0]) if used.size else 0  # no document is shorter than that
        over = POSITION if self._table.of_rows else LENGTH
        return Profiles(over, self._edges[first:], whole[..., first:])


def _ends(report: Report, stat: str) -> tuple[float, float]:
    """Between which ends a distribution is drawn: nearly all rows of nearly every head lie there.

    Shares and probabilities of every head; of what has no bound, some heads may lie far out.
    """
    maps = [one for one in report.maps if one.stat == stat]
    low, high = (
        np.concatenate([one.grids[measure][np.isfinite(one.grids[measure])] for one in maps])
        for measure in ("p05", "p95")
    )
    if not low.size or not high.size:
        return 0.0, 1.0
    bounded = maps[0].statistic.unit in (PROBABILITY, "share")
    first, last = (low.min(), high.max()) if bounded else (np.quantile(low, 0.02), np.quantile(high, 0.98))
    if maps[0].statistic.from_zero:
        first = min(first, 0.0)
    return (float(first), float(last)) if last > first else (float(first), float(first) + 1.0)


def _edges(longest: int) -> NDArray[np.int64]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... and the end."""
    steps = [0, 1]
    while steps[-1] < longest:
        power = 1 << (steps[-1].bit_length() - 1)
        steps.append(steps[-1] + max(1, power // 2))
    steps[-1] = max(longest, 1)
    return np.array(steps, dtype=np.int64)
