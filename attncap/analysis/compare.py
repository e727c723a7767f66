"""`compare`: which heads differ between two runs, or between two groups of documents, and by how much."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attncap.accumulate import canonical_order
from attncap.analysis.documents import SEQUENCES, DocumentTable
from attncap.analysis.permutation import Array, HeadTests, independent, paired
from attncap.display import table_html
from attncap.progress import plural
from attncap.store import Run, RunFolder, RunMismatchError, read_run

HEADINGS = ("statistic", "head", "mean A", "mean B", "effect (g)", "corrected p")
"""Of a table of differences."""

_SHOWN = 20
_FEWEST = 3


@dataclass(frozen=True)
class HeadDifference:
    """One head and statistic; see `attncap.analysis.permutation.HeadTests`. p is None where nothing was tested."""

    stat: str
    layer: int
    module: str
    call: int  # which call of the module in a forward
    head: int
    mean_a: float
    mean_b: float
    effect: float
    p: float | None
    p_corrected: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """As a row of a table under `HEADINGS`."""
        p = "not tested" if self.p_corrected is None else f"{self.p_corrected:.4f}"
        head = f"layer {self.layer} head {self.head}" + (f" call {self.call}" if self.call else "")
        return self.stat, head, f"{self.mean_a:.4f}", f"{self.mean_b:.4f}", f"{self.effect:+.2f}", p


@dataclass(frozen=True)
class Comparison:
    """Differences of all heads.

    Attributes:
        differences: by statistic, layer and head.
        documents_a, documents_b: how many were compared; rows of heads where there are no tables of documents.
        paired: whether the two are the same documents.
        why_untested: why there are no p, where there are none.
    """

    differences: tuple[HeadDifference, ...]
    documents_a: int
    documents_b: int
    paired: bool
    why_untested: str = ""

    def found(self, level: float = 0.05) -> list[HeadDifference]:
        """Heads whose corrected p is at most `level`, by falling size of the effect."""
        passed = [one for one in self.differences if one.p_corrected is not None and one.p_corrected <= level]
        return sorted(passed, key=lambda one: -abs(one.effect))

    def shown(self, level: float = 0.05) -> list[HeadDifference]:
        """The heads that a table shows: the largest effects, of those that were found where there were tests."""
        largest = sorted(self.differences, key=lambda one: -abs(one.effect))
        return (largest if self.why_untested else self.found(level))[:_SHOWN]

    def remarks(self, level: float = 0.05) -> list[str]:
        """What stands under that table."""
        if self.why_untested:
            return [f"Nothing was tested: {self.why_untested}"]
        number = len(self.found(level))
        shown = f", the {_SHOWN} largest are shown" if number > _SHOWN else ""
        what = f"{self.documents_a:,} and {plural(self.documents_b, 'document')}"
        if self.paired:
            what = f"the same {plural(self.documents_a, 'document')} twice"
        return [
            f"{number:,} of {len(self.differences):,} heads and statistics differ at {level:g}{shown}: {what}; "
            "p by permutation of documents, corrected for all heads of a statistic (Westfall and Young)."
        ]

    def _repr_html_(self) -> str:
        """What a notebook shows: the table that the command prints."""
        rows = [one.cells for one in self.shown()]
        return table_html("Heads that differ", " ".join(self.remarks()), HEADINGS, rows)


def compare(
    run_a: str | os.PathLike[str],
    run_b: str | os.PathLike[str],
    *,
    group_a: str | None = None,
    group_b: str | None = None,
    stats: Sequence[str] | None = None,
    permutations: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare every head of two finished runs, or of two groups of one.

    With tables of documents in both (``--keep sequences``) each document's mean is one observation, and differences are
    tested by permutation and corrected for the number of heads of a statistic, by statistic. Where both runs read the
    same corpus and the same groups, documents are paired. Without the tables the effect is that of the rows in
    heads.parquet and nothing is tested, for the rows of a document are not independent.

    Args:
        group_a, group_b: only documents of these groups; `group_b` is `group_a` where None.
        stats: names as in heads.parquet; None for all that both have.
        permutations: how many exchanges; the smallest p is 1 / (permutations + 1).
        seed: of the exchanges. Equal seeds give equal results.

    Raises:
        RunMismatchError: the runs have other heads, no such group or statistic, or too few documents.
        RunError: a run is not finished or damaged.
    """
    if permutations < 1:
        raise ValueError(f"permutations: expected at least 1, got {permutations}")
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    if isinstance(stats, str):
        raise TypeError(f"stats: expected a list of names, got {stats!r}")
    a, b = read_run(run_a), read_run(run_b)
    group_b = group_a if group_b is None else group_b
    if not all(RunFolder(run.path).table(SEQUENCES).is_file() for run in (a, b)):
        return _compare_rows(a, b, group_a, group_b, stats)
    same = a.scan["corpus"]["fingerprint"] == b.scan["corpus"]["fingerprint"] and group_a == group_b
    if same and a.path.resolve() == b.path.resolve():
        raise RunMismatchError(f"{run_a}: compared with itself; give another run, or two groups")
    documents_a, documents_b = DocumentTable(a, group_a), DocumentTable(b, group_b)
    heads = _same_heads(documents_a.heads, documents_b.heads, a, b)
    same = same and np.array_equal(documents_a.documents, documents_b.documents)
    differences: list[HeadDifference] = []
    for stat in _chosen(stats, documents_a.stats, documents_b.stats):
        values = documents_a.values(stat), documents_b.values(stat)
        tests = _test(values, same, permutations, seed)
        if tests is not None:
            differences += _rows(stat, heads, tests)
    if not differences:
        raise RunMismatchError(f"{run_a}, {run_b}: too few documents to compare, at least {_FEWEST} on each side")
    return Comparison(tuple(differences), len(documents_a.documents), len(documents_b.documents), same)


def _test(values: tuple[Array, Array], same: bool, permutations: int, seed: int) -> HeadTests | None:
    """None where too few documents have the statistic in every head."""
    whole_a, whole_b = (np.isfinite(one).all(1) for one in values)
    if same:
        both = whole_a & whole_b
        return paired(values[0][both], values[1][both], permutations, seed) if both.sum() >= _FEWEST else None
    if min(whole_a.sum(), whole_b.sum()) < _FEWEST:
        return None
    return independent(values[0][whole_a], values[1][whole_b], permutations, seed)


def _rows(stat: str, heads: Sequence[tuple[int, str, int, int]], tests: HeadTests) -> list[HeadDifference]:
    numbers = (tests.mean_a, tests.mean_b, tests.effect, tests.p, tests.p_corrected)
    return [
        HeadDifference(stat, *head, *(float(column[place]) for column in numbers)) for place, head in enumerate(heads)
    ]


def _compare_rows(a: Run, b: Run, group_a: str | None, group_b: str | None, stats: Sequence[str] | None) -> Comparison:
    """Effects from the means and standard deviations of heads.parquet."""
    sides = _summaries(a, group_a), _summaries(b, group_b)
    names = [list(dict.fromkeys(key[0] for key in side)) for side in sides]
    differences = []
    for stat in _chosen(stats, *names):
        keys = [{key[1:] for key in side if key[0] == stat} for side in sides]
        for layer, module, head in _same_heads(sorted(keys[0]), sorted(keys[1]), a, b):
            (mean_a, variance_a, _), (mean_b, variance_b, _) = (side[stat, layer, module, head] for side in sides)
            spread = float(np.sqrt((variance_a + variance_b) / 2))
            difference = mean_a - mean_b
            effect = difference / spread if spread else float("inf") * np.sign(difference) if difference else 0.0
            differences.append(HeadDifference(stat, layer, module, 0, head, mean_a, mean_b, float(effect), None, None))
    counts = [max((count for _, _, count in side.values()), default=0) for side in sides]
    why = "not both runs have sequences.parquet, and rows of one document are not independent; scan --keep sequences"
    return Comparison(tuple(differences), counts[0], counts[1], False, why)


def _summaries(run: Run, group: str | None) -> dict[tuple[str, int, str, int], tuple[float, float, int]]:
    """(stat, layer, module, head) -> (mean, variance, count) over the rows of one group, or of all together."""
    found: dict[tuple[str, int, str, int], tuple[float, float, int]] = {}
    rows = run.heads.to_pylist()
    groups = {row["group"] for row in rows}
    if group is not None and group not in groups:
        raise RunMismatchError(f"{run.path}: has no group {group!r}; there is {', '.join(sorted(groups))}")
    for row in rows:
        if row["count"] and group in (None, row["group"]):
            key = row["stat"], row["layer"], row["module"], row["head"]
            mean, variance, count = found.get(key, (0.0, 0.0, 0))
            total = count + row["count"]
            share, delta = row["count"] / total, row["mean"] - mean
            spread = variance * (1 - share) + row["std"] ** 2 * share + delta**2 * share * (1 - share)
            found[key] = mean + delta * share, spread, total
    return found


def _chosen(wanted: Sequence[str] | None, in_a: Sequence[str], in_b: Sequence[str]) -> list[str]:
    both = set(in_a) & set(in_b)
    for stat in wanted or ():
        if stat not in both:
            there = ", ".join(sorted(both)) or "none"
            raise RunMismatchError(f"the statistic {stat!r} is not in both runs; there is {there}")
    return canonical_order(both if wanted is None else set(wanted))


def _same_heads(heads_a: list[Any], heads_b: list[Any], a: Run, b: Run) -> list[Any]:
    """The heads, which must be the same on both sides; modules may have other names."""
    if [(head[0], *head[2:]) for head in heads_a] != [(head[0], *head[2:]) for head in heads_b]:
        names = [(run.scan.get("model") or {}).get("name", "a model") for run in (a, b)]
        raise RunMismatchError(
            f"{a.path} and {b.path}: have other layers and heads, {len(heads_a)} heads ({names[0]}) and {len(heads_b)} "
            f"({names[1]}); compare runs of models of one shape"
        )
    return heads_a
