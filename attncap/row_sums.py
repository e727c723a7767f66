"""Sums over rows in torch's own operators, for tensors on any device; nothing here waits for it.

S statistics   B sequences   H heads   N rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attncap import histogram
from attncap.moments import Moments, RowValues, Sequences, fold, merge, pick

# How many float64 values are reduced at once, in few launches.
_CHUNK = 1 << 24


def add(statistics: Sequence[RowValues], members: Mapping[str, list[int] | None], numbers: Sequence[int]) -> None:
    """Count rows in the summaries that they go to.

    Args:
        statistics: S of them, all of one shape (B, H, N); several are packed together so that there are few operations.
        members: group -> the places of its sequences in the batch, None for all of them.
        numbers: of the H heads, among those that the summaries are of.
    """
    first = statistics[0].values
    step = max(1, _CHUNK // max(1, first.numel()))
    for start in range(0, len(statistics), step):
        pack = statistics[start : start + step]
        packed = torch.stack([one.values.to(torch.float64) for one in pack])
        asked = torch.stack([one.counted for one in pack])
        finite = (packed - packed == 0) & asked  # x - x is NaN for a non-finite x
        sequences = _moments(packed, finite, asked.sum(-1)).among(numbers, _heads(pack[0]))
        for group, places in members.items():
            merge([one.states[group] for one in pack], sequences if places is None else sequences.pick(places))
            for one, counts in zip(pack, finite, strict=True):
                values, counted = one.values, counts
                if places is not None:
                    values, counted = pick(values, places, 0), pick(counts, places, 0)
                _count_bins(one.states[group], values, counted, numbers, one.signed)


def _heads(rows: RowValues) -> int:
    return len(next(iter(rows.states.values())).count)


def _moments(packed: Tensor, counts: Tensor, asked: Tensor) -> Sequences:
    """Count, mean, M2, min and max of each sequence by itself: (S, B, H, N) -> (S, B, H) each.

    `packed` is used up. `asked` is how many rows would count if all were finite.
    """
    skipped = ~counts
    count = counts.sum(-1)
    mean = fold(packed.masked_fill_(skipped, 0.0)) / count.clamp_min(1).to(torch.float64)
    if packed.shape[-1] == 0:
        low = high = torch.full_like(mean, torch.inf)
    else:
        # Which of -0.0 and 0.0 is found depends on the order of the search; adding 0.0 leaves one zero.
        low = packed.masked_fill_(skipped, torch.inf).amin(-1) + 0.0
        high = packed.masked_fill_(skipped, -torch.inf).amax(-1) + 0.0
    m2 = fold(packed.sub_(mean[..., None]).square_().masked_fill_(skipped, 0.0))
    return Sequences(count, asked - count, mean, m2, low, high if packed.shape[-1] else -high)


def _count_bins(state: Moments, values_BHN: Tensor, counts_BHN: Tensor, numbers: Sequence[int], signed: bool) -> None:
    """Add rows to a histogram, if there is one. Integers, so the order of the additions does not matter."""
    if state.bins is None:
        return
    total, bins = state.bins.shape
    index = histogram.bin_index(values_BHN, signed)
    first = torch.arange(total, device=index.device) * bins
    index += (first if len(numbers) == total else pick(first, list(numbers), 0))[:, None]
    state.bins.view(-1).scatter_add_(0, index.flatten(), counts_BHN.flatten().to(torch.int64))
