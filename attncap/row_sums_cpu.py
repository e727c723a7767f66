"""Launcher of the compiled sums over rows: those of `attncap.row_sums`, with the same bits, for tensors on the CPU.

B sequences   H heads   N rows
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attncap.dispatch import kernel_hash
from attncap.moments import Moments, RowValues


@functools.cache
def is_built() -> bool:
    """Whether the extension is there."""
    return kernel_hash() is not None


def serves(rows: RowValues) -> bool:
    """Whether `add` can read these rows: plain tensors in memory, and an extension to do so."""
    tensors = (rows.values, rows.counted, *[state.count for state in rows.states.values()])
    plain = all(type(tensor) is Tensor and tensor.is_cpu for tensor in tensors)
    return plain and is_built() and rows.values.dtype in (torch.float32, torch.float64)


def add(statistics: Sequence[RowValues], members: Mapping[str, list[int] | None], numbers: Sequence[int]) -> None:
    """As `attncap.row_sums.add`."""
    from attncap import _C
    from attncap.native import array_of

    batch, _, rows = statistics[0].values.shape
    group_of = {place: group for group, places in members.items() for place in places or range(batch)}
    described = []
    for one in statistics:
        moments = {group: _C.Moments(*_addresses(state)) for group, state in one.states.items()}
        of_sequences = [moments[group_of[place]] for place in range(batch)]
        described.append(_C.RowValues(array_of(_C, one.values), array_of(_C, one.counted), of_sequences, one.signed))
    _C.add_rows(described, batch, rows, list(numbers))


def _addresses(state: Moments) -> tuple[int, ...]:
    numbers = (state.count, state.nonfinite, state.mean, state.m2, state.low, state.high)
    bins = (0, 0) if state.bins is None else (state.bins.data_ptr(), state.bins.shape[1])
    return (*[tensor.data_ptr() for tensor in numbers], *bins)
