"""Tables of single documents: what `attncap scan --keep sequences` and `--keep rows` write beside heads.parquet.

sequences.parquet has one row per document, module, call and head: the mean of each statistic over the document's rows,
its largest value where thresholds are set on that, and the key (and the offset) that most rows have their largest
probability on. rows.parquet has one row per document, module, call, head and position.

A shard's table is a part of the run like its summary; the end puts them together in the order of the shards, some
hundred thousand rows to a row group, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attncap.accumulate import Heads, canonical_order
from attncap.encode import Encoded
from attncap.extras import require
from attncap.kept_stats import KeptStats
from attncap.store import TABLES
from attncap.types import HeadStats, StatSpec

KINDS = SEQUENCES, ROWS = TABLES
NAMES = ("group", "module")  # columns of names, dictionary-coded
_ROWS_OF_A_GROUP = 1 << 17
_COMPRESSED = 0.9  # what zstd leaves of such numbers
# What is thresholded by its largest value: attention sinks at any key (received_mass), QK-clip (max_logit).
_WITH_LARGEST = ("max_logit", "received_mass")
_INT32 = ("tokens", "head", "call", "position", "token", "layer", "focus_key", "focus_offset")


class Keeper(KeptStats):
    """Collects the tables of one shard, in the place of what a capture keeps of single calls."""

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__("summary")
        self._kinds = kinds
        self._columns: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        self._batch: Sequence[Encoded] = ()
        self._calls: dict[str, int] = {}
        self._observed: tuple[Mapping[str, Tensor], Mapping[str, Tensor], Heads] | None = None

    def begin(self, batch: Sequence[Encoded]) -> None:
        """The documents of the forward that follows."""
        self._batch, self._calls = batch, {}

    def observe(self, module: str, values: Mapping[str, Tensor], counted: dict[str, Tensor], heads: Heads) -> None:
        """Statistics of a call, name -> (B, H, N), which rows count, and which heads these are; `keep` follows."""
        self._observed = values, counted, heads

    def keep(self, module: str, stats: HeadStats) -> None:
        """Take the statistics of one call."""
        call = self._calls[module] = self._calls.get(module, -1) + 1
        if self._observed is None:  # other processes hand these heads in
            return
        (values, counted, heads), self._observed = self._observed, None
        if SEQUENCES in self._kinds:
            columns = {**self._documents(heads), **_sequence_columns(values, counted)}
            if stats.topk_index is not None and stats.topk_index.shape[-1]:
                columns |= _focus_columns(stats.topk_index[..., 0], stats.lse != -torch.inf)
            self._add(SEQUENCES, module, call, columns)
        if ROWS in self._kinds:
            self._add(ROWS, module, call, self._row_columns(values, counted, stats, heads))

    def _documents(self, heads: Heads) -> dict[str, Any]:
        """Columns that say which document and head, (B * H) each."""
        of_each = [(one.number, one.group, one.length) for one in self._batch for _ in heads.numbers]
        numbers, groups, lengths = zip(*of_each, strict=True)
        head = np.tile(np.array(heads.numbers), len(self._batch))
        return {"document": np.array(numbers), "group": list(groups), "tokens": np.array(lengths), "head": head}

    def _row_columns(
        self, values: Mapping[str, Tensor], counted: Mapping[str, Tensor], stats: HeadStats, heads: Heads
    ) -> dict[str, Any]:
        """Columns of the rows that count, those of a document and head together."""
        wanted = (stats.lse != -torch.inf).cpu()
        batch, head, position = wanted.nonzero(as_tuple=True)
        tokens = [one.inputs.get("input_ids", [-1] * one.length) for one in self._batch]
        columns: dict[str, Any] = {
            "document": np.array([one.number for one in self._batch])[batch],
            "group": [self._batch[place].group for place in batch.tolist()],
            "head": np.array(heads.numbers)[head],
            "position": position.numpy(),
            "token": np.array(
                [int(tokens[b][p]) if p < len(tokens[b]) else -1 for b, p in zip(batch, position, strict=True)]
            ),
        }
        for name in canonical_order(set(values)):
            if values[name].shape == stats.lse.shape:
                found = values[name].masked_fill(~counted[name].expand_as(values[name]), torch.nan)
                columns[name] = found.cpu()[wanted].float().numpy()
        if stats.topk_index is not None and stats.topk_prob is not None:
            columns["topk_index"] = stats.topk_index.cpu()[wanted].numpy()
            columns["topk_prob"] = stats.topk_prob.cpu()[wanted].float().numpy()
        return columns

    def _add(self, kind: str, module: str, call: int, columns: dict[str, Any]) -> None:
        length = len(columns["document"])
        self._columns[kind].append({**columns, "module": [module] * length, "call": np.full(length, call)})

    @property
    def parts(self) -> dict[str, list[dict[str, Any]]]:
        """Kind -> what the table is made of; parts of other processes may be added."""
        return self._columns

    def tables(self) -> dict[str, bytes]:
        """Kind -> the table of the shard as an Arrow stream, by document, module in order of execution, call, head."""
        return {kind: _to_bytes(columns) for kind, columns in self._columns.items()}


def _sequence_columns(values: Mapping[str, Tensor], counted: Mapping[str, Tensor]) -> dict[str, Any]:
    """Mean of each statistic over the rows that count, (B * H); NaN where none does."""
    columns: dict[str, Any] = {}
    for name in canonical_order(set(values)):
        value = values[name].to(torch.float64)
        rows = counted[name].expand_as(value) & value.isfinite()
        mean = value.masked_fill(~rows, 0.0).sum(-1) / rows.sum(-1)
        columns[name] = mean.flatten().float().cpu().numpy()
        if name in _WITH_LARGEST:
            largest = value.masked_fill(~rows, -torch.inf).amax(-1).masked_fill(~rows.any(-1), torch.nan)
            columns[f"{name}_largest"] = largest.flatten().float().cpu().numpy()
    return columns


def _focus_columns(key_BHQ: Tensor, rows_BHQ: Tensor) -> dict[str, Any]:
    """The key, and the offset, that most rows have their largest probability on, and the share of rows that do."""
    keys = key_BHQ.to(torch.int64)
    rows_BHQ = rows_BHQ & (keys >= 0)
    position = torch.arange(keys.shape[-1], device=keys.device)
    columns: dict[str, Any] = {}
    furthest = int(keys.max().clamp_min(0)) if keys.numel() else 0
    for name, place, shift in (("focus_key", keys, 0), ("focus_offset", keys - position, keys.shape[-1])):
        counts = torch.zeros(*keys.shape[:2], furthest + 1 + shift, dtype=torch.int64, device=keys.device)
        counts.scatter_add_(-1, (place + shift).clamp_min(0), rows_BHQ.to(torch.int64))
        most = counts.max(-1)
        columns[name] = (most.indices - shift).flatten().cpu().numpy()
        share = most.values / rows_BHQ.sum(-1)
        columns[f"{name}_share"] = share.flatten().float().cpu().numpy()
    return columns


def _to_bytes(parts: list[dict[str, Any]]) -> bytes:
    pyarrow = require("pyarrow", "scan")
    if not parts:
        return b""
    order = {module: place for place, module in enumerate(dict.fromkeys(part["module"][0] for part in parts))}
    joined = {name: _joined(name, parts) for name in dict.fromkeys(name for part in parts for name in part)}
    module = np.array([order[name] for name in joined["module"]])
    keys = [joined[name] for name in ("position", "head", "call") if name in joined]
    places = np.lexsort([*keys, module, joined["document"]])  # the last is the first that is looked at
    table = pyarrow.table({name: _arrow(name, values[places]) for name, values in joined.items()})
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _joined(name: str, parts: list[dict[str, Any]]) -> NDArray[Any]:
    """A column of all parts; NaN, or -1, where a module does not have it."""
    blank = -1 if name in _INT32 else np.nan
    columns = [part[name] if name in part else np.full(len(part["module"]), blank) for part in parts]
    if name in NAMES:
        return np.array([value for column in columns for value in column], dtype=object)
    return np.concatenate(columns)


def _arrow(name: str, values: NDArray[Any]) -> Any:
    pyarrow = require("pyarrow", "scan")
    if name in NAMES:
        return pyarrow.array(values, pyarrow.string())
    if values.ndim == 2:
        offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        flat = values.reshape(-1).astype(np.int32 if name == "topk_index" else np.float32)
        return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat))
    kind = np.int64 if name == "document" else np.int32 if name in _INT32 else np.float32
    return pyarrow.array(values.astype(kind))


def write_table(path: Path, parts: Iterable[bytes], modules: Sequence[str]) -> None:
    """Put the tables of the shards together in one Parquet file: row groups, names dictionary-coded, zstd.

    Args:
        parts: the Arrow streams of the shards in order; read one at a time.
        modules: in the order of layers, which are added as a column.
    """
    pyarrow, parquet = require("pyarrow", "scan"), require("pyarrow.parquet", "scan")
    writer = None
    try:
        for table in _chunks(parts):
            layer = pyarrow.array([modules.index(name) for name in table["module"].to_pylist()], pyarrow.int32())
            whole = table.add_column(0, "layer", layer).combine_chunks()
            for name in NAMES:
                place = whole.schema.get_field_index(name)
                whole = whole.set_column(place, name, whole[name].dictionary_encode())
            lead = ["document", "group", "layer", "module", "call", "head"]
            whole = whole.select([*lead, *(name for name in whole.column_names if name not in lead)])
            if writer is None:
                writer = parquet.ParquetWriter(path, whole.schema, compression="zstd", use_dictionary=list(NAMES))
            writer.write_table(whole, row_group_size=_ROWS_OF_A_GROUP)
    finally:
        if writer is not None:
            writer.close()


def _chunks(parts: Iterable[bytes]) -> Iterator[Any]:
    """Tables of about a row group each."""
    pyarrow = require("pyarrow", "scan")
    pending: list[Any] = []
    for part in parts:
        if part:
            pending.append(pyarrow.ipc.open_stream(part).read_all())
        while sum(table.num_rows for table in pending) >= _ROWS_OF_A_GROUP:
            whole = pyarrow.concat_tables(pending)
            yield whole.slice(0, _ROWS_OF_A_GROUP)
            pending = [whole.slice(_ROWS_OF_A_GROUP)]
    whole = pyarrow.concat_tables(pending) if pending else None
    if whole is not None and whole.num_rows:
        yield whole


def estimated_bytes(kind: str, documents: int, longest: int, heads: int, spec: StatSpec, tags: int) -> int:
    """About how many bytes a table takes on disk; that of rows at most, for documents of `longest` tokens."""
    columns = 1 + tags + len(spec.offsets) + 2 * spec.entropy + 3 * spec.max + bool(spec.sink) + bool(spec.topk)
    columns += (spec.diagonal is not None) + spec.distance + spec.collision + 2 * spec.received
    if kind == SEQUENCES:
        return int(_COMPRESSED * documents * heads * 4 * (columns + (4 if spec.topk else 0)))
    return int(_COMPRESSED * documents * longest * heads * 4 * (columns + 2 + 2 * spec.topk))
