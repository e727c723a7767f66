"""Count, mean, M2, min and max of rows, in sums whose order is fixed.

The result does not depend, in any bit, on the batch size, on right padding or on the number of threads: each sequence
is reduced by itself with additions whose order depends on the absolute row index alone, and the sequences are merged
one after another in their order.

    S statistics   B sequences   H heads   N rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass
class Moments:
    """Running summary of one statistic of one module and group, one entry per head. M2 = sum (x - mean)^2."""

    count: Tensor  # (H,) int64
    nonfinite: Tensor  # (H,) int64, rows left out because the statistic was not finite
    mean: Tensor  # (H,) float64
    m2: Tensor  # (H,) float64
    low: Tensor  # (H,) float64, +inf while nothing was counted
    high: Tensor  # (H,) float64, -inf while nothing was counted
    bins: Tensor | None = None  # (H, bins) int64
    described: Any = field(default=None, init=False, repr=False, compare=False)  # row_sums_cpu's, of these tensors

    def replace(self, **tensors: Tensor) -> None:
        """Put others in the place of some of its tensors."""
        vars(self).update(tensors, described=None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has tensors of its own."""
        return vars(self) | {"described": None}

    @classmethod
    def empty(cls, heads: int, device: torch.device, bins: int) -> Moments:
        """A summary of nothing; `bins` = 0 for no histogram."""
        none, mean = (torch.zeros(2, heads, dtype=dtype, device=device) for dtype in (torch.int64, torch.float64))
        infinite = torch.full((heads,), torch.inf, dtype=torch.float64, device=device)
        counts = torch.zeros(heads, bins, dtype=torch.int64, device=device) if bins else None
        return cls(none[0], none[1], mean[0], mean[1], infinite, -infinite, counts)


class RowValues(NamedTuple):
    """One statistic of the rows of a call, and the summaries that they go to."""

    values: Tensor  # (B, H, N) floating
    counted: Tensor  # (B, H, N) bool
    states: Mapping[str, Moments]  # group -> summary
    signed: bool  # whether it can be negative


@dataclass(frozen=True)
class Sequences:
    """Each sequence reduced by itself, (S, B, H)."""

    count: Tensor
    nonfinite: Tensor
    mean: Tensor
    m2: Tensor
    low: Tensor
    high: Tensor

    def pick(self, places: list[int]) -> Sequences:
        """The sequences of one group."""
        return Sequences(*(pick(getattr(self, each.name), places, 1) for each in fields(self)))

    def among(self, numbers: Sequence[int], total: int) -> Sequences:
        """The same heads under their numbers among so many in all, of which the others count nothing."""
        if len(numbers) == total:
            return self
        blanks = Moments.empty(1, self.count.device, 0)
        places = {number: place for place, number in enumerate(numbers)}
        found = {}
        for name in (each.name for each in fields(self)):
            values = getattr(self, name)
            blank = getattr(blanks, name).expand(values.shape[:-1])
            columns = [values[..., places[number]] if number in places else blank for number in range(total)]
            found[name] = torch.stack(columns, dim=-1)
        return Sequences(**found)


def pick(tensor: Tensor, places: list[int], dim: int) -> Tensor:
    """Entries along a dimension; by slices, for an index tensor would have to be sent to the device."""
    return torch.stack([tensor.select(dim, place) for place in places], dim=dim)


def fold(values: Tensor) -> Tensor:
    """Sum over the last dimension in an order that depends on the absolute index alone.

    Row i is added to row i + P/2, then P/4, ... with P the next power of two. A longer P only adds zeros (the upper
    half is empty), so padding rows that hold 0 change no bit, and elementwise additions know no threads.
    """
    length = values.shape[-1]
    if length == 0:
        return values.new_zeros(values.shape[:-1])
    half = 1 << (length - 1).bit_length() >> 1
    if length < 2 * half:
        upper = length - half
        lower = values[..., :half].clone()
        lower[..., :upper] += values[..., half:]
        values, half = lower, half >> 1
    while half:
        values, half = values[..., :half] + values[..., half:], half >> 1
    return values[..., 0] + 0.0  # -0.0 becomes 0.0, as it would have beside a padding row


def merge(states: list[Moments], sequences: Sequences) -> None:
    """Merge the sequences (S, B, H) one after another into the S states (Chan, Golub and LeVeque 1983)."""
    before = {each.name: torch.stack([getattr(state, each.name) for state in states]) for each in fields(sequences)}
    after_SBH = before["count"][:, None] + sequences.count.cumsum(1)
    share_SBH = sequences.count.to(torch.float64) / after_SBH.clamp_min(1).to(torch.float64)
    weight_SBH = (after_SBH - sequences.count).to(torch.float64) * share_SBH
    mean, m2 = before["mean"], before["m2"]
    along_B = (numbers.unbind(1) for numbers in (sequences.mean, sequences.m2, share_SBH, weight_SBH))
    for mean_SH, m2_SH, share_SH, weight_SH in zip(*along_B, strict=True):
        delta = mean_SH - mean
        mean = mean + delta * share_SH
        m2 = m2 + (m2_SH + delta * delta * weight_SH)
    merged = {
        "count": after_SBH[:, -1],
        "nonfinite": before["nonfinite"] + sequences.nonfinite.sum(1),
        "mean": mean,
        "m2": m2,
        "low": torch.minimum(before["low"], sequences.low.amin(1)),
        "high": torch.maximum(before["high"], sequences.high.amax(1)),
    }
    of_states = zip(*(numbers.unbind(0) for numbers in merged.values()), strict=True)
    for state, numbers_of in zip(states, of_states, strict=True):
        state.replace(**dict(zip(merged, numbers_of, strict=True)))
