"""The table of single documents of a run (``--keep sequences``), as numbers of documents by heads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attncap.analysis.permutation import Array
from attncap.extras import require
from attncap.store import Run, RunFolder, RunMismatchError

SEQUENCES = "sequences"
_PLACES = ("document", "group", "layer", "module", "call", "head", "tokens")


class DocumentTable:
    """sequences.parquet, a statistic at a time.

    Args:
        group: only the documents of this group; None for all.

    Attributes:
        documents: their numbers in the corpus, (n,), rising. groups: the group of each.
        heads: (layer, module, call, head) of each column, in order. stats: names of the statistics.

    Raises:
        RunMismatchError: the table is damaged, or there is no such group.
    """

    def __init__(self, run: Run, group: str | None) -> None:
        folder = RunFolder(run.path)
        if not folder.tables_are_intact(run.scan):
            raise RunMismatchError(
                f"{folder.table(SEQUENCES)}: damaged (its sha256 is not the one in scan.json); "
                "give the same `attncap scan` command again to recompute it"
            )
        self._path = folder.table(SEQUENCES)
        table = self._read(["document", "group", "layer", "module", "call", "head"])
        groups = table["group"].to_numpy(zero_copy_only=False).astype(str)
        if group is not None and group not in groups:
            known = ", ".join(sorted(set(groups.tolist())))
            raise RunMismatchError(f"{run.path}: has no group {group!r}; there is {known}")
        self._rows: NDArray[np.bool_] = np.ones(len(groups), bool) if group is None else groups == group
        heads = [table[name].to_numpy(zero_copy_only=False)[self._rows] for name in ("layer", "call", "head")]
        keys, self._column = np.unique(np.stack(heads), axis=1, return_inverse=True)
        numbers = table["document"].to_numpy()[self._rows]
        self.documents, first, self._row = np.unique(numbers, return_index=True, return_inverse=True)
        self.groups: list[str] = groups[self._rows][first].tolist()
        modules = dict(zip(heads[0].tolist(), table["module"].to_numpy(zero_copy_only=False)[self._rows], strict=True))
        self.heads = [(layer, str(modules[layer]), call, head) for layer, call, head in keys.T.tolist()]
        columns = require("pyarrow.parquet", "scan").read_schema(self._path).names
        self.stats = [name for name in columns if name not in _PLACES and not name.startswith("focus_")]

    def values(self, stat: str) -> Array:
        """(documents, heads), NaN where a document has none."""
        found = np.full((len(self.documents), len(self.heads)), np.nan)
        found[self._row, self._column] = self._read([stat])[stat].to_numpy()[self._rows]
        return found

    def _read(self, columns: list[str]) -> Any:
        with require("pyarrow.parquet", "scan").ParquetFile(self._path, pre_buffer=False) as file:
            return file.read(columns=columns, use_threads=False)
