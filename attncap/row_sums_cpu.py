"""Launcher of the compiled sums over rows: those of `attncap.row_sums`, with the same bits, for tensors on the CPU.

S statistics   B sequences   H heads   N rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attncap.moments import RowValues, Sequences


def serves(rows: RowValues) -> bool:
    """Whether `reduce` can read these rows: plain tensors in memory."""
    tensors = (rows.values, rows.counted, *(state.count for state in rows.states.values()))
    plain = all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors)
    return plain and rows.values.dtype in (torch.float32, torch.float64)


def reduce(
    statistics: Sequence[RowValues], members: Mapping[str, list[int] | None], numbers: Sequence[int]
) -> Sequences:
    """As `attncap.row_sums.reduce`."""
    from attncap import _C
    from attncap.cpu import array_of

    batch, heads, rows = statistics[0].values.shape
    integers = torch.empty(2, len(statistics), batch, heads, dtype=torch.int64)
    floats = torch.empty(4, len(statistics), batch, heads, dtype=torch.float64)
    group_of = {place: group for group, places in members.items() for place in places or range(batch)}
    described = []
    for one in statistics:
        found = {group: state.bins for group, state in one.states.items() if state.bins is not None}
        addresses = {group: bins.data_ptr() for group, bins in found.items()}
        width = next((bins.shape[1] for bins in found.values()), 0)
        histograms = [addresses[group_of[place]] for place in range(batch)] if found else []
        values, counted = array_of(one.values), array_of(one.counted)
        described.append(_C.RowValues(values, counted, histograms, width, one.signed))
    _C.summarise(described, batch, rows, list(numbers), integers.data_ptr(), floats.data_ptr())
    return Sequences(*integers, *floats)
