"""What a report says of one run, as plain data; the template and the script only lay it out.

Everything here is read from a run. Text is plain: who writes it into HTML or a terminal escapes it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attncap.analysis.patterns import HeadPattern, find_patterns
from attncap.analysis.roles import RoleResult, find_roles
from attncap.report.findings import Contrast, Fact, facts_of, findings_of
from attncap.report.glossary import PROBABILITY, Statistic, describe, display_rank
from attncap.store import Run

if TYPE_CHECKING:
    import pyarrow

MEASURES = ("mean", "std", "min", "max", "p05", "p50", "p95", "count")
"""The numbers of a head, in the order of heads.parquet's columns but for `count`."""

ALL_TOGETHER = ""
"""The group of the maps that pool all groups of a run that has several."""

Grid = NDArray[np.float64]
"""layers x heads; NaN where a layer has no such head, or nothing was counted."""


@dataclass(frozen=True, eq=False)
class HeatMap:
    """One statistic of one group: a grid per measure."""

    stat: str
    group: str
    statistic: Statistic
    grids: Mapping[str, Grid]
    threshold: float | None = None  # beyond it a head has the role this statistic stands for


@dataclass(frozen=True)
class Layer:
    """A row of the heat maps."""

    number: int
    module: str
    heads: int


@dataclass(frozen=True, eq=False)
class Report:
    """What a run says."""

    model: str
    corpus: str
    facts: tuple[Fact, ...]
    findings: tuple[str, ...]
    roles: tuple[RoleResult, ...]
    patterns: tuple[HeadPattern, ...]
    layers: tuple[Layer, ...]
    heads: int  # of the widest layer
    maps: tuple[HeatMap, ...]  # by statistic in the order shown, all groups together before the single ones

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups there are, in the order of the table, all together first where there are several."""
        return tuple(dict.fromkeys(one.group for one in self.maps))

    @property
    def overview(self) -> tuple[HeatMap, ...]:
        """One heat map per statistic: of all groups together."""
        first: dict[str, HeatMap] = {}
        for one in self.maps:
            first.setdefault(one.stat, one)
        return tuple(first.values())

    @property
    def stats(self) -> tuple[str, ...]:
        """The statistics, in the order shown."""
        return tuple(one.stat for one in self.overview)


def build_report(run: Run) -> Report:
    """What a run says."""
    scan = run.scan
    spec, tags = scan.get("spec") or {}, names_of(scan.get("tags"))
    layers = _layers(run.heads)
    roles = find_roles(run.heads, spec=spec, tags=tags)
    thresholds = {one.role.stat: one.role.threshold for one in roles if one.role.highest and one.role.less is None}
    maps = _maps(run.heads, layers, spec, tags, thresholds)
    return Report(
        model=str((scan.get("model") or {}).get("name", "unknown model")),
        corpus=", ".join(names_of((scan.get("corpus") or {}).get("sources"))) or "unknown corpus",
        facts=facts_of(scan),
        findings=findings_of(scan, roles, _breadth_by_layer(maps, layers), _contrast(maps, layers)),
        roles=roles,
        patterns=_patterns(run.heads),
        layers=layers,
        heads=max((layer.heads for layer in layers), default=0),
        maps=maps,
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


def bounds_of(values: Grid, from_zero: bool, middle: bool = False) -> tuple[float, float]:
    """(low, high) of the colours of a map; (-x, x) around a middle of 0. They are never equal."""
    known = values[np.isfinite(values)]
    if not known.size:
        return (-1.0, 1.0) if middle else (0.0, 1.0)
    low, high = float(known.min()), float(known.max())
    if middle:
        furthest = max(abs(low), abs(high)) or 1.0
        return -furthest, furthest
    if from_zero:
        low = min(low, 0.0)
    return low, high if high > low else low + 1.0


def _layers(table: pyarrow.Table) -> tuple[Layer, ...]:
    places = zip(*(table.column(name).to_pylist() for name in ("layer", "module", "head")), strict=True)
    heads: dict[tuple[int, str], int] = {}
    for layer, module, head in set(places):
        heads[layer, module] = max(heads.get((layer, module), 0), head + 1)
    return tuple(Layer(number, module, count) for (number, module), count in sorted(heads.items()))


def _patterns(table: pyarrow.Table) -> tuple[HeadPattern, ...]:
    try:
        return find_patterns(table)
    except ValueError:  # the statistics it needs were not captured
        return ()


def _maps(
    table: pyarrow.Table,
    layers: tuple[Layer, ...],
    spec: Mapping[str, Any],
    tags: tuple[str, ...],
    thresholds: Mapping[str, float | None],
) -> tuple[HeatMap, ...]:
    places = {(layer.number, layer.module): row for row, layer in enumerate(layers)}
    shape = len(layers), max((layer.heads for layer in layers), default=0)
    names = ("layer", "module", "stat", "group")
    layer, module, stat, group = (table.column(name).to_pylist() for name in names)
    rows = np.array([places[place] for place in zip(layer, module, strict=True)], dtype=np.intp)
    columns = table.column("head").to_numpy()
    numbers = {name: table.column(name).to_numpy().astype(np.float64) for name in MEASURES}
    members: dict[str, dict[str, list[int]]] = {}
    for place, (of_stat, of_group) in enumerate(zip(stat, group, strict=True)):
        members.setdefault(of_stat, {}).setdefault(of_group, []).append(place)
    found = []
    for name in sorted(members, key=lambda name: display_rank(name, tags)):
        by_group = {}
        for of_group, chosen in members[name].items():
            grids = {measure: np.full(shape, np.nan) for measure in MEASURES}
            for measure, grid in grids.items():
                values = numbers[measure][chosen]
                grid[rows[chosen], columns[chosen]] = np.where(np.isfinite(values), values, np.nan)
            by_group[of_group] = grids
        if len(by_group) > 1:
            by_group = {ALL_TOGETHER: pooled(by_group.values()), **by_group}
        statistic = describe(name, spec, tags)
        found += [HeatMap(name, key, statistic, grids, thresholds.get(name)) for key, grids in by_group.items()]
    return tuple(found)


def pooled(groups: Iterable[Mapping[str, Grid]]) -> dict[str, Grid]:
    """The numbers of all rows of several groups; percentiles of a whole cannot be told from those of its parts."""
    groups = list(groups)
    stacked = {name: np.stack([one[name] for one in groups]) for name in MEASURES}
    counts = np.where(np.isfinite(stacked["mean"]), np.nan_to_num(stacked["count"]), 0.0)
    total = counts.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = counts / total
    mean = (share * np.nan_to_num(stacked["mean"])).sum(0)
    spread = np.nan_to_num(stacked["std"]) ** 2 + (np.nan_to_num(stacked["mean"]) - mean) ** 2
    empty = ~(total > 0)
    found = {
        "mean": mean,
        "std": np.sqrt((share * spread).sum(0)),
        "min": np.fmin.reduce(stacked["min"]),
        "max": np.fmax.reduce(stacked["max"]),
        "count": total,
    }
    found = {name: np.where(empty, np.nan, grid) for name, grid in found.items()}
    return {name: found.get(name, np.full(total.shape, np.nan)) for name in MEASURES}


def _breadth_by_layer(maps: Iterable[HeatMap], layers: tuple[Layer, ...]) -> dict[int, float]:
    """Layer -> mean relative entropy of its heads."""
    grid = next((one.grids["mean"] for one in maps if one.stat == "relative_entropy"), None)
    found: dict[int, list[float]] = {}
    if grid is None:
        return {}
    for row, layer in enumerate(layers):
        found.setdefault(layer.number, []).extend(grid[row][np.isfinite(grid[row])].tolist())
    return {number: sum(values) / len(values) for number, values in found.items() if values}


def _contrast(maps: Iterable[HeatMap], layers: tuple[Layer, ...]) -> Contrast | None:
    """The head, probability and two groups whose means are furthest apart."""
    by_stat: dict[str, list[HeatMap]] = {}
    for one in maps:
        by_stat.setdefault(one.stat, []).append(one)
    best: Contrast | None = None
    for found in by_stat.values():
        groups = [one for one in found if one.group != ALL_TOGETHER]
        if len(groups) < 2 or groups[0].statistic.unit != PROBABILITY:
            continue
        means = np.stack([one.grids["mean"] for one in groups])
        apart = np.nan_to_num(np.fmax.reduce(means) - np.fmin.reduce(means))
        row, head = (int(place) for place in np.unravel_index(apart.argmax(), apart.shape))
        if apart[row, head] > (best.high - best.low if best else 0.0):
            of_head = means[:, row, head]
            high, low = int(np.nanargmax(of_head)), int(np.nanargmin(of_head))
            best = Contrast(
                title=groups[0].statistic.title,
                label=f"layer {layers[row].number} head {head}",
                high=float(of_head[high]),
                high_group=groups[high].group,
                low=float(of_head[low]),
                low_group=groups[low].group,
            )
    return best
