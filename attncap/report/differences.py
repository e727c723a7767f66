"""Two runs beside each other, as grids that a page or a figure draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attncap.analysis.compare import Comparison, compare
from attncap.progress import plural
from attncap.report.content import Grid, Layer, Report
from attncap.report.glossary import Statistic, describe
from attncap.store import Run, RunMismatchError

LEVEL = 0.05
"""Heads whose corrected p is at most this are marked."""

PERMUTATIONS = 2000

MEASURES = ("mean_a", "mean_b", "difference", "effect", "p")


@dataclass(frozen=True, eq=False)
class DifferenceMap:
    """One statistic: a grid per measure (`MEASURES`), `p` corrected for the number of heads, NaN where untested."""

    stat: str
    statistic: Statistic
    grids: dict[str, Grid]


@dataclass(frozen=True, eq=False)
class Differences:
    """Run A and run B.

    Attributes:
        label_a, label_b: what they are called.
        sentences: what was compared and found.
        found: heads that differ, in words, the largest effect first.
        layers: rows of the grids; a module that is called several times in a forward has a row for each call.
        opens: whether these rows are those of run A's own maps.
    """

    label_a: str
    label_b: str
    sentences: tuple[str, ...]
    found: tuple[str, ...]
    layers: tuple[Layer, ...]
    heads: int
    maps: tuple[DifferenceMap, ...]
    opens: bool


def build_differences(a: Run, b: Run, report: Report, labels: tuple[str, str]) -> Differences:
    """Compare two runs.

    Args:
        report: that of run `a`.

    Raises:
        RunMismatchError: they have other layers and heads, no statistic in common, or are the same run.
    """
    comparison = compare(a.path, b.path, permutations=PERMUTATIONS)
    layers = _layers(comparison)
    width = max((layer.heads for layer in layers), default=0)
    spec, tags = a.scan.get("spec") or {}, tuple(a.scan.get("tags") or ())
    maps = _maps(comparison, width, lambda stat: describe(stat, spec, tags))
    ordered = sorted(
        maps, key=lambda one: report.stats.index(one.stat) if one.stat in report.stats else len(report.stats)
    )
    return Differences(
        label_a=labels[0],
        label_b=labels[1],
        sentences=_sentences(comparison, a, b),
        found=_found(comparison, {one.stat: one.statistic.title for one in maps}),
        layers=layers,
        heads=width,
        maps=tuple(ordered),
        opens=[(layer.number, layer.heads) for layer in layers]
        == [(layer.number, layer.heads) for layer in report.layers],
    )


def _layers(comparison: Comparison) -> tuple[Layer, ...]:
    heads: dict[tuple[int, int, str], int] = {}
    for one in comparison.differences:
        place = one.layer, one.call, one.module
        heads[place] = max(heads.get(place, 0), one.head + 1)
    return tuple(
        Layer(number, module + (f" call {call}" if call else ""), count)
        for (number, call, module), count in sorted(heads.items())
    )


def _maps(comparison: Comparison, width: int, describe_stat: Callable[[str], Statistic]) -> list[DifferenceMap]:
    rows = {
        place: row for row, place in enumerate(sorted({(d.layer, d.call, d.module) for d in comparison.differences}))
    }
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for one in comparison.differences:
        grids = found.setdefault(one.stat, {name: np.full((len(rows), width), np.nan) for name in MEASURES})
        place = rows[one.layer, one.call, one.module], one.head
        p = np.nan if one.p_corrected is None else one.p_corrected
        numbers = (one.mean_a, one.mean_b, one.mean_a - one.mean_b, one.effect, p)
        for name, value in zip(MEASURES, numbers, strict=True):
            grids[name][place] = value if np.isfinite(value) else np.nan
    return [DifferenceMap(stat, describe_stat(stat), grids) for stat, grids in found.items()]


def _sentences(comparison: Comparison, a: Run, b: Run) -> tuple[str, ...]:
    sentences = []
    models = [run.scan.get("model") or {} for run in (a, b)]
    if models[0].get("fingerprint") != models[1].get("fingerprint"):
        sentences.append(
            f"The runs are of two models, {models[0].get('name')} (A) and {models[1].get('name')} (B): head by head "
            "they compare only where one was made from the other."
        )
    if comparison.why_untested:
        counts = f"{comparison.documents_a:,} rows of each head in A and {comparison.documents_b:,} in B"
        return (*sentences, f"{counts}. Nothing was tested: {comparison.why_untested}.")
    if comparison.paired:
        what = f"The same {plural(comparison.documents_a, 'document')} in both runs, paired."
    else:
        what = f"{plural(comparison.documents_a, 'document')} in A, {plural(comparison.documents_b, 'document')} in B."
    number = len(comparison.found(LEVEL))
    return (
        *sentences,
        f"{what} {number:,} of {len(comparison.differences):,} heads and statistics differ at {LEVEL:g}; p by "
        f"{PERMUTATIONS:,} permutations of documents, corrected for all heads of a statistic (Westfall and Young "
        "1993). "
        "The effect is Hedges' g, the difference A less B in standard deviations.",
    )


def _found(comparison: Comparison, titles: dict[str, str]) -> tuple[str, ...]:
    tested = not comparison.why_untested
    listed = comparison.found(LEVEL) if tested else sorted(comparison.differences, key=lambda one: -abs(one.effect))
    best: dict[tuple[int, int, int], str] = {}
    for one in listed:
        if one.stat == "lse":  # what it differs by is in other statistics
            continue
        call = f" call {one.call}" if one.call else ""
        p = f", corrected p {one.p_corrected:.4f}" if one.p_corrected is not None else ""
        best.setdefault(
            (one.layer, one.call, one.head),
            f"Layer {one.layer} head {one.head}{call}: {titles[one.stat]} {one.mean_a:.3g} in A and {one.mean_b:.3g} "
            f"in B (effect {one.effect:+.2f}{p}).",
        )
    return tuple(best.values())[:8]


def check_alike(runs: tuple[Run, ...]) -> None:
    """Refuse the same run twice.

    Raises:
        RunMismatchError: two of them are one.
    """
    seen = set()
    for run in runs:
        place = run.path.resolve()
        if place in seen:
            raise RunMismatchError(f"{run.path}: given twice; give other runs to compare it with")
        seen.add(place)
