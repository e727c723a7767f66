"""What the script of the page draws: everything as JSON, numbers as packed arrays."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attncap.analysis.results import CURVE, GROUP, HEADS, Result
from attncap.analysis.roles import HeadRole
from attncap.colours import DARK, DIVERGING_DARK, DIVERGING_LIGHT, LIGHT
from attncap.report.content import ALL_TOGETHER, MEASURES, HeatMap, Report
from attncap.report.details import Details
from attncap.report.differences import LEVEL, Differences
from attncap.report.differences import MEASURES as DIFFERENCE_MEASURES

BUDGET = 4_000_000
"""Bytes that the statistics of all groups of all runs may take before groups are left out."""

MOST_PAIRS = 50_000
"""Of a result on pairs of heads; where there are more, the largest and the smallest of each head are kept."""

_PAIRS_OF_A_HEAD = 6

_TYPES = {"f8": np.float64, "f4": np.float32, "i4": np.int32, "u1": np.uint8}
_DIFFERENCE_NAMES = ("mean A", "mean B", "A less B", "effect (Hedges' g)", "corrected p")


@dataclass(frozen=True, eq=False)
class RunContent:
    """A run as it stands on the page."""

    label: str
    report: Report
    details: Details | None
    results: tuple[Result, ...]

    def row_of(self, head: HeadRole) -> int:
        """The row of a head in the maps."""
        return next(
            row
            for row, layer in enumerate(self.report.layers)
            if (layer.number, layer.module) == (head.layer, head.module)
        )


def pack(values: NDArray[Any], kind: str) -> dict[str, Any]:
    """An array as its bytes in base64, little-endian; `kind` is one of f8, f4, i4, u1."""
    array = np.ascontiguousarray(values, dtype=np.dtype(_TYPES[kind]).newbyteorder("<"))
    return {"type": kind, "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def page_data(runs: Sequence[RunContent], comparisons: Sequence[Differences]) -> dict[str, Any]:
    """Everything."""
    return {
        "measures": MEASURES,
        "level": LEVEL,
        "colours": {
            "light": LIGHT,
            "dark": DARK,
            "diverging_light": DIVERGING_LIGHT,
            "diverging_dark": DIVERGING_DARK,
        },
        "runs": [_run(one, BUDGET // len(runs)) for one in runs],
        "comparisons": [_comparison(one) for one in comparisons],
    }


def _run(one: RunContent, budget: int) -> dict[str, Any]:
    report = one.report
    groups = _kept_groups(report, budget)
    by_place = {(found.stat, found.group): found for found in report.maps}
    shape = len(report.layers), report.heads
    blank = np.full(shape, np.nan)
    numbers = np.array(
        [
            [
                [by_place[stat, group].grids[measure] if (stat, group) in by_place else blank for measure in MEASURES]
                for group in groups
            ]
            for stat in report.stats
        ]
    ).reshape(len(report.stats), len(groups), len(MEASURES), *shape)
    return {
        "label": one.label,
        "model": report.model,
        "corpus": report.corpus,
        **_places(report.layers, report.heads),
        "groups": groups,
        "dropped": len(report.groups) - len(groups),
        "stats": [_stat(found) for found in report.overview],
        "numbers": pack(numbers, "f8"),
        "roles": _roles(report),
        "patterns": _patterns(report),
        "details": None if one.details is None else _details(one.details),
        "results": [_result(result, report) for result in one.results],
    }


def _kept_groups(report: Report, budget: int) -> list[str]:
    """As many groups as the page has room for, those with most rows; always the first one, which may be all of them."""
    size = len(report.stats) * len(MEASURES) * len(report.layers) * report.heads * 8
    room = max(1, budget // max(size, 1))
    if len(report.groups) <= room:
        return list(report.groups)
    rows: dict[str, float] = dict.fromkeys(report.groups, 0.0)
    for one in report.maps:
        rows[one.group] = max(rows[one.group], float(np.nan_to_num(one.grids["count"]).max(initial=0.0)))
    ranked = sorted(report.groups, key=lambda group: (group != ALL_TOGETHER, -rows[group]))
    return [group for group in report.groups if group in ranked[:room]]


def _places(layers: Sequence[Any], heads: int) -> dict[str, Any]:
    return {
        "layers": [{"number": layer.number, "module": layer.module, "heads": layer.heads} for layer in layers],
        "width": heads,
    }


def _stat(one: HeatMap) -> dict[str, Any]:
    return {
        "stat": one.stat,
        "title": one.statistic.title,
        "unit": one.statistic.unit,
        "explanation": one.statistic.explanation,
        "fromZero": one.statistic.from_zero,
        "measure": one.statistic.measure,
        "threshold": one.threshold,
    }


def _rows(report: Report) -> dict[tuple[int, str], int]:
    return {(layer.number, layer.module): row for row, layer in enumerate(report.layers)}


def _roles(report: Report) -> list[dict[str, Any]]:
    rows, found = _rows(report), []
    for result in report.roles:
        means = np.full((len(report.layers), report.heads), np.nan)
        for head in result.ranked:
            means[rows[head.layer, head.module], head.head] = head.mean
        role = result.role
        about = {name: getattr(role, name) for name in ("name", "threshold", "highest", "measures", "source", "rule")}
        found.append({**about, "means": pack(means, "f8")})
    return found


def _patterns(report: Report) -> list[list[str] | None]:
    rows = _rows(report)
    found: list[list[str] | None] = [None] * (len(report.layers) * report.heads if report.patterns else 0)
    for one in report.patterns:
        found[rows[one.layer, one.module] * report.heads + one.head] = [one.pattern, one.rule]
    return found


def _details(details: Details) -> dict[str, Any]:
    shares = details.distributions.shares
    highest = np.maximum(shares.max(-1, keepdims=True), 1e-12)
    receivers = details.receivers
    return {
        "stats": details.stats,
        "of": details.distributions.of,
        "ends": details.distributions.ends.tolist(),
        # Only the shape is drawn: a byte for each bar, the highest is 255.
        "shares": pack(np.round(255 * shares / highest), "u1"),
        "over": details.profiles.over,
        "edges": details.profiles.edges.tolist(),
        "profiles": pack(details.profiles.means, "f4"),
        "examples": [
            {
                "document": one.document,
                "group": one.group,
                "tokens": one.tokens,
                "cut": one.cut,
                "keys": pack(one.keys, "u1"),
                "probabilities": pack(np.round(255 * one.probabilities), "u1"),
            }
            for one in details.examples
        ],
        "receivers": None
        if receivers is None
        else {
            "names": receivers.names,
            "tokens": pack(receivers.tokens, "i4"),
            "shares": pack(receivers.shares, "f4"),
            "keys": receivers.keys,
        },
    }


def _comparison(one: Differences) -> dict[str, Any]:
    numbers = np.array([[found.grids[measure] for measure in DIFFERENCE_MEASURES] for found in one.maps])
    shape = len(one.maps), len(DIFFERENCE_MEASURES), len(one.layers), one.heads
    return {
        "a": one.label_a,
        "b": one.label_b,
        **_places(one.layers, one.heads),
        "opens": one.opens,
        "measures": ["a", "b", "difference", "effect", "p"],
        "names": _DIFFERENCE_NAMES,
        "columns": ["mean_a", "mean_b", "difference", "effect", "p_corrected"],
        "stats": [
            {
                "stat": found.stat,
                "title": found.statistic.title,
                "unit": found.statistic.unit,
                "fromZero": found.statistic.from_zero,
            }
            for found in one.maps
        ],
        "numbers": pack(numbers.reshape(shape), "f8"),
    }


def _result(result: Result, report: Report) -> dict[str, Any]:
    about = {
        "name": result.name,
        "title": result.title,
        "kind": result.kind,
        "plane": [[column.name for column in result.columns].index(name) for name in result.plane],
        "columns": [
            {"name": one.name, "unit": one.unit, "meaning": one.meaning, "zero": one.zero} for one in result.columns
        ],
    }
    if result.kind == CURVE:
        return {**about, "groups": [], "numbers": pack(_columns(result), "f8")}
    if result.kind == HEADS:
        groups, grids = result_grids(result, report)
        return {**about, "groups": groups, "numbers": pack(grids, "f8")}
    numbers, places = _columns(result), pair_places(result, report)
    chosen: NDArray[np.bool_] = np.asarray((places >= 0).all(0))
    if len(chosen) > MOST_PAIRS:
        chosen &= _outermost(numbers, places, report.heads)
    return {
        **about,
        "groups": [],
        "numbers": pack(numbers[:, chosen], "f8"),
        "places": pack(places[:, chosen], "i4"),
        "dropped": int((~chosen).sum()),
    }


def _outermost(numbers: NDArray[np.float64], places: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
    """Which pairs are among the largest or the smallest of one of their heads, by any number."""
    chosen = np.zeros(numbers.shape[1], dtype=bool)
    for head in (places[0] * width + places[1], places[2] * width + places[3]):
        for values in numbers:
            for sign in (1, -1):
                order = np.lexsort([sign * values, head])
                rank = np.arange(len(order)) - np.searchsorted(head[order], head[order])
                chosen[order[rank < _PAIRS_OF_A_HEAD]] = True
    return chosen


def result_grids(result: Result, report: Report) -> tuple[list[str], NDArray[np.float64]]:
    """(groups, numbers (columns, groups, layers, heads)) of a result on heads, less those that the run lacks."""
    of_rows = [str(group) for group in result.data.get(GROUP, ["all"] * result.rows)]
    groups = list(dict.fromkeys(of_rows))
    grids = np.full((len(result.columns), len(groups), len(report.layers), report.heads), np.nan)
    row, head = _places_of(result.data, report)
    group = np.array([groups.index(one) for one in of_rows], dtype=np.int64)
    there = row >= 0
    for place, values in enumerate(_columns(result)):
        grids[place, group[there], row[there], head[there]] = values[there]
    return groups, grids


def pair_places(result: Result, report: Report) -> NDArray[np.int64]:
    """(4, pairs): row and head of the maps, of both heads of a pair; -1 where the run has no such head."""
    return np.array([_places_of(result.data, report), _places_of(result.data, report, "other_")]).reshape(4, -1)


def _columns(result: Result) -> NDArray[np.float64]:
    return np.array([result.data[one.name] for one in result.columns], dtype=np.float64)


def _places_of(data: Mapping[str, Sequence[Any]], report: Report, prefix: str = "") -> NDArray[np.int64]:
    """(2, rows): row and head of the maps, -1 where the run has no such head."""
    by_module = {layer.module: row for row, layer in enumerate(report.layers)}
    by_number = {layer.number: row for row, layer in reversed(list(enumerate(report.layers)))}
    columns = (data[prefix + name] for name in ("layer", "module", "head"))
    found = []
    for layer, module, head in zip(*columns, strict=True):
        row = by_module.get(module, by_number.get(layer, -1))
        found.append((row, head) if row >= 0 and head < report.layers[row].heads else (-1, -1))
    places: NDArray[np.int64] = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return places
