"""Results of an analysis, kept in a run as RUN/analyses/NAME.parquet, for the report and for anyone's own tables.

A result is a table with words: what its numbers are, and what they were computed from. There are three kinds:

    heads    one row per head (and group): every number is a heat map; two of them may be places in the plane
    pairs    one row per two heads
    curve    the first number is the horizontal axis, the others are lines over it
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from attncap.extras import require
from attncap.parts import whole_file
from attncap.store import ANALYSES, RunError

HEADS, PAIRS, CURVE = "heads", "pairs", "curve"

_HEAD = ("layer", "module", "head")
PLACES: Mapping[str, tuple[str, ...]] = {
    HEADS: _HEAD,
    PAIRS: (*_HEAD, *(f"other_{name}" for name in _HEAD)),
    CURVE: (),
}
"""Kind -> columns that say which head a row is of. A result of kind "heads" may have "group" beside them."""

GROUP = "group"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_METADATA = b"attncap"
_TEXTS = ("module", "other_module", GROUP)
_WHOLE = ("layer", "head", "other_layer", "other_head")


class ResultDamagedError(RunError):
    """The file of a result is not what an analysis wrote."""


@dataclass(frozen=True)
class Column:
    """A number of every row.

    Attributes:
        name: in the table. unit: "nats", "probability", ...; "" for a plain number.
        meaning: in one sentence, for a reader who does not know the analysis.
        zero: whether 0 is a middle with two sides, so that it is drawn in two colours.
    """

    name: str
    unit: str
    meaning: str
    zero: bool = False


@dataclass(frozen=True)
class Result:
    """What an analysis found.

    Attributes:
        name: of the file: lower-case letters, digits, underscores. title: of a section of the report.
        text: what it means, its formula and its source; paragraphs with an empty line between them.
        kind: "heads", "pairs" or "curve".
        columns: the numbers, in the order they are shown.
        data: column -> one value per row; first `PLACES` of the kind (and "group"), then those of `columns`. NaN where
            there is no number.
        plane: for heads: the two columns that are places in the plane, or nothing.
        made_from: what the numbers depend on (model, documents, options), as JSON can hold it.
    """

    name: str
    title: str
    text: str
    kind: str
    columns: tuple[Column, ...]
    data: Mapping[str, Sequence[Any]]
    plane: tuple[str, ...] = ()
    made_from: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: expected lower-case letters, digits and underscores, got {self.name!r}")
        if self.kind not in PLACES:
            raise ValueError(f"kind: expected one of {', '.join(PLACES)}, got {self.kind!r}")
        numbers = [column.name for column in self.columns]
        group = [GROUP] if self.kind == HEADS and GROUP in self.data else []
        if not numbers or list(self.data) != [*PLACES[self.kind], *group, *numbers]:
            raise ValueError(
                f"data: expected the columns {', '.join([*PLACES[self.kind], *group, *numbers])} of a result of kind "
                f"{self.kind}, got {', '.join(self.data) or 'none'}"
            )
        lengths = {name: len(values) for name, values in self.data.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"data: expected columns of one length, got {lengths}")
        if self.plane and (self.kind != HEADS or len(self.plane) != 2 or not set(self.plane) <= set(numbers)):
            raise ValueError(f"plane: expected two of the columns of heads, got {self.plane} for {', '.join(numbers)}")

    @property
    def rows(self) -> int:
        """How many."""
        return len(next(iter(self.data.values())))

    def by_head(self, column: str, group: str | None = None) -> dict[tuple[int, int], float]:
        """(layer, head) -> the number, of a result of kind "heads"; of one group where there are several.

        Raises:
            ValueError: another kind, or no such column.
        """
        if self.kind != HEADS or column not in self.data:
            raise ValueError(
                f"column: expected a number of heads, got {column!r} of {self.kind} {', '.join(self.data)}"
            )
        groups = self.data.get(GROUP, [group] * self.rows)
        rows = zip(self.data["layer"], self.data["head"], groups, self.data[column], strict=True)
        return {(layer, head): value for layer, head, of, value in rows if group is None or of == group}


def head_places(
    layers: Sequence[str], tables: Mapping[str, Tensor], numbers: Sequence[int] | None = None
) -> dict[str, list[Any]]:
    """`Result.data` of tables (layers, heads), leaving out heads that have a number in none of them.

    Args:
        layers: names of the attention modules. tables: column -> its table.
        numbers: of the layers; None counts them in the order given.
    """
    rows: list[tuple[Any, ...]] = []
    lists = {name: table.tolist() for name, table in tables.items()}
    for place, module in enumerate(layers):
        layer = place if numbers is None else numbers[place]
        for head in range(max(len(table[place]) for table in lists.values())):
            values = [table[place][head] for table in lists.values()]
            if not all(math.isnan(value) for value in values):
                rows.append((layer, module, head, *values))
    rows.sort(key=lambda row: (row[0], row[2]))
    return {name: [row[place] for row in rows] for place, name in enumerate((*_HEAD, *tables))}


def described(
    name: str,
    title: str,
    text: str,
    columns: tuple[Column, ...],
    data: Mapping[str, Sequence[Any]],
    *,
    kind: str = HEADS,
    plane: tuple[str, ...] = (),
) -> Result:
    """A `Result` whose text is paragraphs of any line breaks."""
    paragraphs = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
    return Result(name, title, paragraphs, kind, columns, data, plane)


def result_path(run: str | os.PathLike[str], name: str) -> Path:
    """Where the result of an analysis lies in a run."""
    return Path(run) / ANALYSES / f"{name}.parquet"


def save_result(run: str | os.PathLike[str], result: Result) -> Path:
    """Write RUN/analyses/NAME.parquet, whole or not at all; gives its path.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow, parquet = require("pyarrow", "scan"), require("pyarrow.parquet", "scan")
    table = pyarrow.table({name: _arrow(name, values) for name, values in result.data.items()})
    words = {name: value for name, value in asdict(result).items() if name != "data"}
    words["sha256"] = _digest(words, table)
    table = table.replace_schema_metadata({_METADATA: json.dumps(words, ensure_ascii=False).encode()})
    path = result_path(run, result.name)
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")
    return path


def read_result(path: str | os.PathLike[str]) -> Result:
    """The result in a file that `save_result` wrote, verified.

    Raises:
        FileNotFoundError: there is none.
        ResultDamagedError: it holds something else; the message says what to do.
        MissingExtraError: pyarrow is not installed.
    """
    path = Path(path)
    pyarrow, parquet = require("pyarrow", "report"), require("pyarrow.parquet", "report")
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            table = file.read(use_threads=False)
        words = json.loads((table.schema.metadata or {})[_METADATA])
        digest = words.pop("sha256")
        intact = digest == _digest(words, table)
        words |= {"columns": tuple(Column(**column) for column in words["columns"]), "plane": tuple(words["plane"])}
        result = Result(**words, data={name: table[name].to_pylist() for name in table.column_names})
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise ResultDamagedError(f"{_damaged(path)} ({type(error).__name__}: {error}); {_repair(path)}") from error
    if not intact or result.name != path.stem:
        raise ResultDamagedError(f"{_damaged(path)} (its sha256 is not the one of what it holds); {_repair(path)}")
    return result


def read_results(run: str | os.PathLike[str]) -> dict[str, Result]:
    """All results in a run, by name.

    Raises:
        ResultDamagedError: one of them is damaged.
    """
    paths = sorted((Path(run) / ANALYSES).glob("*.parquet"))
    return {path.stem: read_result(path) for path in paths}


def _arrow(name: str, values: Sequence[Any]) -> Any:
    pyarrow = require("pyarrow", "scan")
    if name in _TEXTS:
        return pyarrow.array(list(values), pyarrow.string())
    if name in _WHOLE:
        return pyarrow.array([int(value) for value in values], pyarrow.int32())
    return pyarrow.array([float(value) for value in values], pyarrow.float64())


def _digest(words: Mapping[str, Any], table: Any) -> str:
    """sha256 of the words and the numbers, however the file is laid out."""
    digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in _TEXTS:
            digest.update(json.dumps([name, column.to_pylist()]).encode())
        else:
            digest.update(name.encode())
            digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _damaged(path: Path) -> str:
    return f"{path}: damaged, or not the result of an analysis"


def _repair(path: Path) -> str:
    return f"`attncap analyse {path.parent.parent} --only {path.stem}` makes it anew"
