"""Sums of heads put together over the processes of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from attncap.monitor.head_sums import Entry, HeadSums


class Processes:
    """The processes of a group, each of which has sums of its own.

    They first agree, once, on what there are sums of: processes may run different modules. After that everything
    travels in one vector that is added up: the sums, and the maxima in places of their own for every process, 0 in
    those of the others. Adding 0 changes no number, -inf included, so that the maxima arrive as they were.

    Args:
        group: None for all processes; where torch.distributed is not in use there is this one alone.
    """

    def __init__(self, group: distributed.ProcessGroup | None) -> None:
        self._group = group
        self._layout: tuple[Entry, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of them."""
        return not _in_use() or distributed.get_rank(self._group) == 0

    def layout(self, sums: HeadSums) -> Sequence[Entry]:
        """What `packed` gave numbers of."""
        return self._layout or sums.layout

    def packed(self, sums: HeadSums, device: torch.device, *, waits: bool) -> tuple[Sequence[Entry], Tensor, Tensor]:
        """What `HeadSums.unpacked` takes, of all processes together. All of them are to call it.

        Args:
            device: of the vectors.
            waits: read from the device whether a process has modules that were not agreed on, and agree anew then;
                without it they are left out until the next call that waits.
        """
        if not _in_use() or distributed.get_world_size(self._group) == 1:
            return (sums.layout, *sums.packed(sums.layout, device))
        if not self._layout:
            self._agree(sums)
        added, highest = sums.packed(self._layout, device)
        is_new = added.new_full((1,), float(not set(sums.layout) <= set(self._layout)))
        places = highest.new_zeros(distributed.get_world_size(self._group), len(highest))
        places[distributed.get_rank(self._group)] = highest
        together = torch.cat([is_new, added, places.flatten()])
        distributed.all_reduce(together, distributed.ReduceOp.SUM, self._group)
        if waits and together[0] > 0:
            self._agree(sums)
            return self.packed(sums, device, waits=False)
        added, of_all = together[1 : 1 + len(added)], together[1 + len(added) :]
        return self._layout, added, of_all.view_as(places).amax(0)

    def _agree(self, sums: HeadSums) -> None:
        """Everything that a process has, in the order of the processes."""
        layouts: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(layouts, (*self._layout, *sums.layout), self._group)
        self._layout = tuple(dict.fromkeys(entry for layout in layouts for entry in layout))


def _in_use() -> bool:
    return distributed.is_available() and distributed.is_initialized()
