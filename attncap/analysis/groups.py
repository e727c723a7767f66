"""Whether heads prefer classes or tasks: how much of a head's variance from document to document is between groups.

The groups are those of the scan (``--group-by``). Each document's mean of a statistic is one observation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attncap.accumulate import canonical_order
from attncap.analysis.documents import SEQUENCES, DocumentTable
from attncap.analysis.permutation import Array, by_group
from attncap.store import Run, RunFolder, RunMismatchError, read_run

_FEWEST = 2  # documents of a group


@dataclass(frozen=True)
class HeadPreference:
    """One head and statistic. p is None where nothing was tested.

    Attributes:
        eta_squared: share of the variance that lies between groups, from 0 to 1.
        means: group -> mean.
    """

    stat: str
    layer: int
    module: str
    call: int  # which call of the module in a forward
    head: int
    eta_squared: float
    p: float | None
    p_corrected: float | None
    means: Mapping[str, float]

    @property
    def highest(self) -> str:
        """The group with the largest mean."""
        return max(self.means, key=lambda group: self.means[group])


@dataclass(frozen=True)
class Preferences:
    """Of all heads.

    Attributes:
        heads: by statistic, layer and head.
        sizes: group -> how many documents, or rows where there is no table of documents.
        expected: the share of variance between groups that chance alone gives on average, (groups - 1) / (n - 1).
        why_untested: why there are no p, where there are none.
    """

    heads: tuple[HeadPreference, ...]
    sizes: Mapping[str, int]
    expected: float
    why_untested: str = ""

    def found(self, level: float = 0.05) -> list[HeadPreference]:
        """Heads whose corrected p is at most `level`, by falling share of variance."""
        passed = [one for one in self.heads if one.p_corrected is not None and one.p_corrected <= level]
        return sorted(passed, key=lambda one: -one.eta_squared)


def group_preference(
    run: str | os.PathLike[str] | Run,
    *,
    groups: Sequence[str] | None = None,
    stats: Sequence[str] | None = None,
    permutations: int = 2000,
    seed: int = 0,
) -> Preferences:
    """Which heads of a run behave otherwise in one group of documents than in another.

    With x_d the mean of a statistic of a head over the rows of document d, m_g the mean over the n_g documents of group
    g and m that over all::

        eta² = sum_g n_g (m_g - m)² / sum_d (x_d - m)²     0 = groups are alike, 1 = nothing varies within them

    tested by exchanging which group a document is of and corrected for the number of heads, by statistic (Westfall and
    Young 1993; `attncap.analysis.permutation`). Documents with a number in every head count. Without the table of
    documents (scan ``--keep sequences``), x are the rows of the texts, from the counts, means and deviations of
    heads.parquet, and nothing is tested, for the rows of a document depend on each other.

    Args:
        run: its folder, or the run itself.
        groups: names of the groups; None for all of at least two documents.
        stats: names as in heads.parquet; None for all.
        permutations: how many exchanges; the smallest p is 1 / (permutations + 1).
        seed: of the exchanges. Equal seeds give equal results.

    Raises:
        RunMismatchError: no such group or statistic; fewer than two groups of two documents.
        RunError: the run is not finished or damaged.
        ValueError: no permutations.
    """
    if permutations < 1:
        raise ValueError(f"permutations: expected at least 1, got {permutations}")
    run = run if isinstance(run, Run) else read_run(run)
    known = sorted(set(run.heads["group"].to_pylist()))
    for group in groups or ():
        if group not in known:
            raise RunMismatchError(f"{run.path}: has no group {group!r}; there is {', '.join(known)}")
    if len(known if groups is None else set(groups)) < 2:
        one = "none but " + known[0] if groups is None else "one"
        raise RunMismatchError(f"{run.path}: expected at least two groups, got {one}; scan with --group-by COLUMN")
    if not RunFolder(run.path).table(SEQUENCES).is_file():
        return _of_rows(run, groups or known, stats)
    table = DocumentTable(run, None)
    label_of = {group: place for place, group in enumerate(_large_enough(table.groups, groups or known, run))}
    chosen = np.array([group in label_of for group in table.groups])
    labels = np.array([label_of[group] for group in table.groups if group in label_of])
    found: list[HeadPreference] = []
    for stat in _chosen(stats, table.stats, run):
        values = table.values(stat)[chosen]
        whole = np.isfinite(values).all(1)
        if np.bincount(labels[whole], minlength=len(label_of)).min(initial=_FEWEST) >= _FEWEST:
            found += _tested(stat, table.heads, values[whole], labels[whole], list(label_of), permutations, seed)
    if not found:
        raise RunMismatchError(f"{run.path}: no statistic has numbers of every head in two documents of each group")
    sizes = {group: int((labels == label).sum()) for group, label in label_of.items()}
    return Preferences(tuple(found), sizes, (len(sizes) - 1) / (sum(sizes.values()) - 1))


def _large_enough(of_documents: Sequence[str], wanted: Sequence[str], run: Run) -> list[str]:
    found = [group for group in wanted if of_documents.count(group) >= _FEWEST]
    if len(found) < 2:
        raise RunMismatchError(
            f"{run.path}: expected two groups of at least {_FEWEST} documents, got {', '.join(found) or 'none'}"
        )
    return found


def _chosen(wanted: Sequence[str] | None, there: Sequence[str], run: Run) -> list[str]:
    for stat in wanted or ():
        if stat not in there:
            raise RunMismatchError(f"stats: {stat!r} is not in {run.path}; there is {', '.join(sorted(there))}")
    return canonical_order(set(there if wanted is None else wanted))


def _tested(
    stat: str,
    heads: Sequence[tuple[int, str, int, int]],
    values: Array,
    labels: Any,
    names: Sequence[str],
    permutations: int,
    seed: int,
) -> list[HeadPreference]:
    tests = by_group(values, labels, permutations, seed)
    means = np.stack([values[labels == label].mean(0) for label in range(len(names))], 1)
    return [
        HeadPreference(
            stat,
            *head,
            float(tests.eta_squared[place]),
            float(tests.p[place]),
            float(tests.p_corrected[place]),
            dict(zip(names, means[place].tolist(), strict=True)),
        )
        for place, head in enumerate(heads)
    ]


def _of_rows(run: Run, groups: Sequence[str], stats: Sequence[str] | None) -> Preferences:
    """From heads.parquet: the total is what lies between groups and what lies within them."""
    rows: dict[tuple[str, int, str, int], dict[str, Any]] = {}
    sizes = dict.fromkeys(groups, 0)
    for row in run.heads.to_pylist():
        if row["group"] in sizes and row["count"]:
            rows.setdefault((row["stat"], row["layer"], row["module"], row["head"]), {})[row["group"]] = row
            sizes[row["group"]] = max(sizes[row["group"]], row["count"])
    found = []
    for stat in _chosen(stats, sorted({key[0] for key in rows}), run):
        for (name, layer, module, head), by_name in sorted(rows.items()):
            if name != stat or len(by_name) < 2:
                continue
            count = np.array([row["count"] for row in by_name.values()], dtype=np.float64)
            mean = np.array([row["mean"] for row in by_name.values()])
            within = float((count * np.array([row["std"] for row in by_name.values()]) ** 2).sum())
            between = float((count * (mean - (count * mean).sum() / count.sum()) ** 2).sum())
            share = between / (between + within) if between else 0.0
            means = {group: row["mean"] for group, row in by_name.items()}
            found.append(HeadPreference(stat, layer, module, 0, head, share, None, None, means))
    why = "there is no sequences.parquet, and rows of one document are not independent; scan --keep sequences"
    return Preferences(tuple(found), sizes, (len(sizes) - 1) / max(sum(sizes.values()) - 1, 1), why)
