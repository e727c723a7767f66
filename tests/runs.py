"""Small finished runs for tests of what reads them, written through the store as a scan writes them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attncap.store import RUN_FORMAT, RunFolder

STATS = ("entropy", "relative_entropy", "max_prob", "sink_mass", "diagonal_mass", "offset_mass[-1]", "offset_mass[1]")

Means = Mapping[tuple[str, int, int], float]
"""(stat, layer, head) -> mean, for the heads a test speaks of."""


def head_rows(
    heads_by_layer: Sequence[int],
    *,
    means: Means | None = None,
    stats: Sequence[str] = STATS,
    groups: Sequence[str] = ("all",),
    module: str = "encoder.layer.{}.attention",
) -> list[dict[str, Any]]:
    """Rows of heads.parquet: unremarkable numbers, and `means` where given."""
    random = np.random.default_rng(7)
    rows = []
    for layer, heads in enumerate(heads_by_layer):
        for stat in stats:
            for group in groups:
                for head in range(heads):
                    mean = 0.05 + 0.1 * random.random() + (0.4 if stat.endswith("entropy") else 0.0)
                    mean = (means or {}).get((stat, layer, head), mean)
                    spread = {"std": 0.02, "min": mean - 0.05, "max": mean + 0.06}
                    quantiles = {"p05": mean - 0.03, "p50": mean, "p95": mean + 0.03}
                    place = {"layer": layer, "module": module.format(layer), "head": head, "stat": stat, "group": group}
                    rows.append({**place, "count": 1000, "mean": mean, **spread, **quantiles})
    return rows


def scan_dict(**changes: Any) -> dict[str, Any]:
    """The content of a finished run's scan.json."""
    scan = {
        "format": RUN_FORMAT,
        "status": "complete",
        "model": {"name": "tiny", "fingerprint": "ab" * 32, "architecture": "BertModel", "layers": 2, "heads": [3, 3]},
        "corpus": {"sources": ["texts.txt"], "fingerprint": "cd" * 32, "options": {}, "documents": 10},
        "spec": {"sink": 4, "diagonal": 0, "topk": 8, "offsets": [-1, 1]},
        "tags": [],
        "features": [],
        "limits": {"max_length": 512},
        "versions": {"attncap": "0.1.0", "torch": "2.13.0"},
        "impl": "cpu",
        "counts": {
            "documents": 10,
            "tokens": 1000,
            "truncated_documents": 1,
            "empty_documents": 2,
            "failed_documents": 0,
        },
        "progress": {"shards_done": 1, "shards_total": 1},
    }
    return {**scan, **changes}


def write_run(
    path: Path, rows: Sequence[Mapping[str, Any]], tables: Mapping[str, Any] | None = None, **scan: Any
) -> Path:
    """A finished run in the folder `path`; `tables` are those of single documents, by kind."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    for kind, table in (tables or {}).items():
        import pyarrow.parquet as parquet

        digest = folder.write_table(kind, functools.partial(parquet.write_table, table))
        scan["tables_sha256"] = {**scan.get("tables_sha256", {}), kind: digest}
    folder.write_scan({**scan_dict(**scan), "heads_sha256": folder.write_heads(rows)})
    return path


def contents(run: Path, *tables: str) -> dict[str, bytes]:
    """The files of a finished run, which has nothing but these; `tables` beside those of every run."""
    found = {path.name: path.read_bytes() for path in sorted(run.iterdir())}
    assert list(found) == sorted(("heads.parquet", "scan.json", *tables))
    return found
