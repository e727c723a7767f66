"""Launcher of the compiled sums over rows: those of `attncap.row_sums`, with the same bits, for tensors on the CPU.

B sequences   H heads   N rows
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attncap.dispatch import kernel_hash
from attncap.moments import Moments, RowValues

_DTYPES = (torch.float32, torch.float64)


@functools.cache
def is_built() -> bool:
    """Whether the extension is there."""
    return kernel_hash() is not None


def serves(statistics: Sequence[RowValues]) -> bool:
    """Whether `add` can read these rows: plain tensors in memory, and an extension to do so."""
    for values, counted, states, _ in statistics:
        if not (type(values) is type(counted) is Tensor and values.is_cpu and counted.is_cpu):
            return False
        if values.dtype not in _DTYPES or not all(state.count.is_cpu for state in states.values()):
            return False
    return is_built()


def add(statistics: Sequence[RowValues], members: Mapping[str, list[int] | None], numbers: Sequence[int]) -> None:
    """As `attncap.row_sums.add`."""
    from attncap import _C
    from attncap.native import array_of

    batch, _, rows = statistics[0].values.shape
    group_of = {place: group for group, places in members.items() for place in places or range(batch)}
    groups = [group_of[place] for place in range(batch)]
    masks = {id(one.counted): one.counted for one in statistics}  # most count the same rows
    counted = {number: array_of(_C, mask) for number, mask in masks.items()}
    described = []
    for values, mask, states, signed in statistics:
        moments = {group: state.described or _described(state) for group, state in states.items()}
        of_sequences = [moments[group] for group in groups]
        described.append(_C.RowValues(array_of(_C, values), counted[id(mask)], of_sequences, signed))
    _C.add_rows(described, batch, rows, list(numbers))


def _described(state: Moments) -> Any:
    from attncap import _C

    numbers = (state.count, state.nonfinite, state.mean, state.m2, state.low, state.high)
    bins = (0, 0) if state.bins is None else (state.bins.data_ptr(), state.bins.shape[1])
    addresses = (*[tensor.data_ptr() for tensor in numbers], *bins)
    state.described = _C.Moments(*addresses)
    return state.described
