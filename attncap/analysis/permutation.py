"""Tests of many heads at once by permutation, corrected for how many they are.

Documents are what is exchanged, never rows: the rows of one document depend on each other. One exchange is made for
all heads together, so the correction knows how they hang together (Westfall and Young 1993, single step): the
corrected p of a head is the share of exchanges in which the largest abs(t) of *any* head is at least that head's own.
It bounds the probability of one false head or more. The permuted number is Welch's t, with which the test also holds
where the two variances differ (Janssen 1997).

    n documents   H heads
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Numbers of one batch of exchanges: some tens of MiB.
_BATCH = 1 << 22


@dataclass(frozen=True)
class HeadTests:
    """One number per head, (H,) each.

    Attributes:
        mean_a, mean_b: over documents.
        effect: Hedges' g, the difference of the means in standard deviations, less the bias of small samples; of
            paired documents, in those of the differences.
        p, p_corrected: two-sided, smallest possible 1 / (permutations + 1) (Phipson and Smyth 2010).
    """

    mean_a: Array
    mean_b: Array
    effect: Array
    p: Array
    p_corrected: Array


def independent(a: Array, b: Array, permutations: int, seed: int) -> HeadTests:
    """Two sets of documents: (n_a, H) and (n_b, H). Exchanges which set a document is of."""
    together = np.concatenate([a, b])
    together = together - together.mean(0)
    squares, number_a, number = together**2, len(a), len(together)

    def t_of(first: Array) -> Array:
        """t of exchanges (P, n) that say with 1 and 0 which documents are the first set."""
        sums, counts = [], []
        for members, size in ((first, number_a), (1.0 - first, number - number_a)):
            mean = members @ together / size
            sums.append(mean)
            counts.append(np.maximum(members @ squares / size - mean**2, 0.0) / max(size - 1, 1))
        return _ratio(sums[0] - sums[1], np.sqrt(counts[0] + counts[1]))

    observed = np.zeros((1, number))
    observed[:, :number_a] = 1.0
    source = np.random.default_rng(seed)
    exchanges = (source.permuted(np.repeat(observed, size, axis=0), axis=1) for size in _sizes(permutations, number))
    p, p_corrected = _p(t_of, observed, exchanges, permutations)
    variances = a.var(0, ddof=1) * (len(a) - 1) + b.var(0, ddof=1) * (len(b) - 1)
    spread = np.sqrt(variances / (number - 2))
    effect = _small_sample(number - 2) * _ratio(a.mean(0) - b.mean(0), spread)
    return HeadTests(a.mean(0), b.mean(0), effect, p, p_corrected)


def paired(a: Array, b: Array, permutations: int, seed: int) -> HeadTests:
    """The same documents twice, (n, H) each. Exchanges the two of a pair."""
    difference = a - b
    number = len(difference)
    squares = (difference**2).mean(0)

    def t_of(signs: Array) -> Array:
        mean = signs @ difference / number
        return _ratio(mean, np.sqrt(np.maximum(squares - mean**2, 0.0) / max(number - 1, 1)))

    source = np.random.default_rng(seed)
    exchanges = (source.choice((-1.0, 1.0), (size, number)) for size in _sizes(permutations, number))
    p, p_corrected = _p(t_of, np.ones((1, number)), exchanges, permutations)
    effect = _small_sample(number - 1) * _ratio(difference.mean(0), difference.std(0, ddof=1))
    return HeadTests(a.mean(0), b.mean(0), effect, p, p_corrected)


@dataclass(frozen=True)
class GroupTests:
    """One number per head, (H,) each.

    Attributes:
        eta_squared: share of the variance over documents that lies between groups, 0 to 1; 0 where there is none.
        p, p_corrected: as in `HeadTests`.
    """

    eta_squared: Array
    p: Array
    p_corrected: Array


def by_group(values: Array, labels: NDArray[np.int64], permutations: int, seed: int) -> GroupTests:
    """Several groups of documents: values (n, H), labels (n,) from 0 on. Exchanges which group a document is of.

    What is permuted is the share of the variance between groups, which rises with the F of an analysis of variance.
    """
    centred = values - values.mean(0)
    total = (centred**2).sum(0)
    sizes = np.bincount(labels)

    def share_of(exchanged: Array) -> Array:
        """(P, H) of labels (P, n)."""
        between = np.zeros((len(exchanged), values.shape[1]))
        for group, size in enumerate(sizes):
            between += ((exchanged == group).astype(np.float64) @ centred) ** 2 / size
        return np.where(total > 1e-24, between / np.maximum(total, 1e-300), 0.0)

    observed = labels[None].astype(np.float64)
    source = np.random.default_rng(seed)
    exchanges = (
        source.permuted(np.repeat(observed, size, axis=0), axis=1) for size in _sizes(permutations, len(labels))
    )
    return GroupTests(share_of(observed)[0], *_p(share_of, observed, exchanges, permutations))


def _p(
    t_of: Callable[[Array], Array], observed: Array, exchanges: Iterator[Array], permutations: int
) -> tuple[Array, Array]:
    """(p, corrected p) of each head."""
    # What rounding makes of equal numbers must not count as larger.
    own = np.abs(t_of(observed))[0] * (1 - 1e-9)
    above = np.zeros(len(own))
    above_any = np.zeros(len(own))
    for exchange in exchanges:
        t = np.abs(t_of(exchange))
        above += (t >= own).sum(0)
        above_any += (t.max(1)[:, None] >= own).sum(0)
    return (above + 1) / (permutations + 1), (above_any + 1) / (permutations + 1)


def _sizes(permutations: int, number: int) -> Iterator[int]:
    batch = max(1, _BATCH // number)
    for start in range(0, permutations, batch):
        yield min(batch, permutations - start)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """0 where nothing differs; infinite where there is a difference and no spread at all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = numerator / denominator
    negligible = np.abs(numerator) <= 1e-12
    return np.where((denominator <= 1e-12) & negligible, 0.0, found)


def _small_sample(freedom: int) -> float:
    """Hedges' correction (1981), exact."""
    if freedom < 2:
        return 1.0
    return math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)
