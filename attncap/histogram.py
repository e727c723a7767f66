"""Histograms of statistics on a fixed logarithmic grid, and the quantiles read from them.

A float32 is its sign, its octave (exponent) and its place in the octave (mantissa), so the upper bits of its bit
pattern are already a logarithmic bin number: no search, no logarithm, nothing that waits for a device.

    64 bins per octave over magnitudes in [2^-16, 2^16); smaller magnitudes are bin 0, larger ones go to the last bin.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BINS_PER_OCTAVE_LOG2 = 6
_SHIFT = 23 - _BINS_PER_OCTAVE_LOG2  # mantissa bits that are dropped
_OCTAVES = 16  # on either side of 1
_LOWEST = (127 - _OCTAVES) << _BINS_PER_OCTAVE_LOG2  # shifted bit pattern of 2^-16
_HIGHEST = ((127 + _OCTAVES) << _BINS_PER_OCTAVE_LOG2) - 1

SIDE_BINS = _HIGHEST - _LOWEST + 1  # bins of one sign, the zero bin not included
SMALLEST = 2.0**-_OCTAVES
RELATIVE_ERROR = 2.0**-_BINS_PER_OCTAVE_LOG2  # width of a bin over the smallest magnitude in it


def bin_count(signed: bool) -> int:
    """How many bins a histogram has: the zero bin, the positive ones, and the negative ones if `signed`."""
    return 1 + SIDE_BINS * (2 if signed else 1)


def bin_index(values: Tensor, signed: bool) -> Tensor:
    """Bin of each value, int64 in [0, bin_count(signed)), rising with the value.

    Without `signed` the few negative values that rounding can make of a probability fall into the zero bin.
    """
    shifted = values.to(torch.float32).view(torch.int32) >> _SHIFT
    if not signed:
        # Negative values have the sign bit set and shift to negative numbers: the clamp sends them to bin 0.
        return (shifted.clamp_(_LOWEST - 1, _HIGHEST) - (_LOWEST - 1)).to(torch.int64)
    magnitude = shifted & (0xFF << _BINS_PER_OCTAVE_LOG2 | ((1 << _BINS_PER_OCTAVE_LOG2) - 1))
    index = magnitude.clamp_(_LOWEST - 1, _HIGHEST) - (_LOWEST - 1)
    return torch.where(shifted < 0, -index, index).to(torch.int64) + SIDE_BINS


def bin_edges(signed: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(low, high) edge of every bin; the zero bin is the point 0."""
    starts = np.arange(_LOWEST, _HIGHEST + 2, dtype=np.int64).astype(np.int32) << _SHIFT
    positive = starts.astype(np.int32).view(np.float32).astype(np.float64)
    low, high = np.concatenate([[0.0], positive[:-1]]), np.concatenate([[0.0], positive[1:]])
    if signed:
        low, high = np.concatenate([-high[:0:-1], low]), np.concatenate([-low[:0:-1], high])
    return low, high


def quantiles(
    counts: NDArray[np.int64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    probabilities: tuple[float, ...],
    signed: bool,
) -> NDArray[np.float64]:
    """Quantiles of the values that a histogram counted.

    The c values of a bin are taken to be spread evenly over it, and the quantile of probability q lies between the
    sorted values around rank q * (n - 1), as in ``numpy.quantile``; the result is clamped to [low, high].

    Error bound: with a and b the two sorted values around that rank, the error against ``numpy.quantile`` is at most
    max(|a|, |b|) / 64 + 2^-16 for magnitudes below 2^16 (and nothing better than [low, high] is known above).

    Args:
        counts: (..., bins) int64.
        low: (...) smallest value seen. high: (...) largest value seen.
        probabilities: the P probabilities, each in [0, 1].
        signed: whether the histogram has negative bins.

    Returns:
        (..., P) float64; NaN where nothing was counted.
    """
    bins = counts.shape[-1]
    flat = counts.reshape(-1, bins)
    edge_low, edge_high = bin_edges(signed)
    result = np.full((flat.shape[0], len(probabilities)), np.nan)
    for row, (row_counts, row_low, row_high) in enumerate(zip(flat, low.reshape(-1), high.reshape(-1), strict=True)):
        used = np.flatnonzero(row_counts)
        if used.size == 0:
            continue
        ends = np.cumsum(row_counts[used])
        rank = np.asarray(probabilities) * float(ends[-1] - 1)

        def value_at(integer_rank: NDArray[np.float64]) -> NDArray[np.float64]:
            # Loop variables are read only within their own turn of the loop.
            place = np.searchsorted(ends, integer_rank, side="right")  # noqa: B023
            here = used[place]  # noqa: B023
            count = row_counts[here]  # noqa: B023
            within = (integer_rank - (ends[place] - count) + 0.5) / count  # noqa: B023
            return edge_low[here] + (edge_high[here] - edge_low[here]) * within

        below = np.floor(rank)
        first, second = value_at(below), value_at(np.ceil(rank))
        result[row] = np.clip(first + (second - first) * (rank - below), row_low, row_high)
    return result.reshape(*counts.shape[:-1], len(probabilities))
