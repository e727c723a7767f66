"""Tables of integers that kernels read on a device."""

from __future__ import annotations

import pytest
import torch

from attncap import UnsupportedError
from attncap.device_tables import NEWEST, on_device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_equal_arguments_give_the_same_tensors_and_the_newest_stay():
    made = []

    @on_device
    def ladder(length: int) -> list[list[tuple[int, int]]]:
        made.append(length)
        return [[(step, 2 * step) for step in range(length)], []]

    first = ladder(3, CPU)
    assert [table.tolist() for table in first] == [[[0, 0], [1, 2], [2, 4]], []]
    assert all(table.dtype == torch.int32 for table in first)
    assert ladder(3, CPU)[0] is first[0]
    for length in range(4, 3 + NEWEST):
        ladder(length, CPU)
        ladder(3, CPU)
    assert ladder(3, CPU)[0] is first[0]
    for length in range(100, 100 + NEWEST):
        ladder(length, CPU)
    assert ladder(3, CPU)[0] is not first[0]
    assert made.count(3) == 2


def test_a_graph_that_is_being_captured_takes_no_new_table(monkeypatch):
    @on_device
    def one(number: int) -> list[list[int]]:
        return [[number]]

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match="must have been computed once before"):
        one(1, GPU)
