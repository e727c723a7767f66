"""What a report says, as plain data; the template only lays it out.

Everything here is read from a run. Text is plain: who writes it into HTML or a terminal escapes it there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from attncap.analysis.roles import RoleResult, find_roles
from attncap.report.findings import Fact, facts_of, findings_of
from attncap.report.glossary import Statistic, describe, display_rank
from attncap.store import Run

MEASURES = ("mean", "std", "min", "max", "p05", "p50", "p95", "count")
"""The numbers of a head, in the order of heads.parquet's columns but for `count`."""

Grid = tuple[tuple[float | None, ...], ...]
"""layers x heads; None where a layer has no such head, or nothing was counted."""


@dataclass(frozen=True)
class HeatMap:
    """One statistic of one group: a grid per measure."""

    stat: str
    group: str
    statistic: Statistic
    grids: Mapping[str, Grid]
    threshold: float | None  # beyond it a head has the role this statistic stands for


@dataclass(frozen=True)
class Layer:
    """A row of the heat maps."""

    number: int
    module: str
    heads: int


@dataclass(frozen=True)
class Report:
    """Everything on the page."""

    model: str
    corpus: str
    facts: tuple[Fact, ...]
    findings: tuple[str, ...]
    roles: tuple[RoleResult, ...]
    layers: tuple[Layer, ...]
    heads: int  # of the widest layer
    maps: tuple[HeatMap, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups there are, in the order of the table."""
        return tuple(dict.fromkeys(one.group for one in self.maps))

    @property
    def overview(self) -> tuple[HeatMap, ...]:
        """One heat map per statistic, of its first group."""
        first: dict[str, HeatMap] = {}
        for one in self.maps:
            first.setdefault(one.stat, one)
        return tuple(first.values())


def build_report(run: Run) -> Report:
    """The report of a run."""
    scan = run.scan
    spec, tags = scan.get("spec") or {}, names_of(scan.get("tags"))
    rows = run.heads.to_pylist()
    layers = _layers(rows)
    roles = find_roles(run.heads, spec=spec, tags=tags)
    thresholds = {one.role.stat: one.role.threshold for one in roles if one.role.highest and one.role.less is None}
    return Report(
        model=str((scan.get("model") or {}).get("name", "unknown model")),
        corpus=", ".join(names_of((scan.get("corpus") or {}).get("sources"))) or "unknown corpus",
        facts=facts_of(scan),
        findings=findings_of(scan, roles, rows),
        roles=roles,
        layers=layers,
        heads=max((layer.heads for layer in layers), default=0),
        maps=_maps(rows, layers, spec, tags, thresholds),
    )


def names_of(value: Any) -> tuple[str, ...]:
    """The names in a list of names or of mappings with a name, or in the keys of a mapping."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping):
        return tuple(str(key) for key in value)
    return tuple(str(one.get("name", one.get("path", one))) if isinstance(one, Mapping) else str(one) for one in value)


def _layers(rows: Iterable[Mapping[str, Any]]) -> tuple[Layer, ...]:
    heads: dict[tuple[int, str], int] = {}
    for row in rows:
        place = (row["layer"], row["module"])
        heads[place] = max(heads.get(place, 0), row["head"] + 1)
    return tuple(Layer(number, module, count) for (number, module), count in sorted(heads.items()))


def _maps(
    rows: Iterable[Mapping[str, Any]],
    layers: tuple[Layer, ...],
    spec: Mapping[str, Any],
    tags: tuple[str, ...],
    thresholds: Mapping[str, float | None],
) -> tuple[HeatMap, ...]:
    widest = max((layer.heads for layer in layers), default=0)
    place = {(layer.number, layer.module): index for index, layer in enumerate(layers)}
    cells: dict[tuple[str, str], dict[str, list[list[float | None]]]] = {}
    for row in rows:
        key = (row["stat"], row["group"])
        if key not in cells:
            cells[key] = {measure: [[None] * widest for _ in layers] for measure in MEASURES}
        for measure in MEASURES:
            cells[key][measure][place[row["layer"], row["module"]]][row["head"]] = _number(row[measure])
    ordered = sorted(cells.items(), key=lambda item: display_rank(item[0][0], tags))  # stable: groups keep their order
    return tuple(
        HeatMap(
            stat=stat,
            group=group,
            statistic=describe(stat, spec, tags),
            grids={measure: tuple(tuple(line) for line in grid) for measure, grid in grids.items()},
            threshold=thresholds.get(stat),
        )
        for (stat, group), grids in ordered
    )


def _number(value: float | None) -> float | None:
    """Six figures, which is more than anyone reads off a page; None for what is not a number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
