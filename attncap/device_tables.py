"""Small tables of integers that kernels read on a device, kept for as long as a kernel may read them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from attncap.types import UnsupportedError

NEWEST = 64  # a batch passes through many layers, and few batches are under way

Tables = tuple[Tensor, ...]


def on_device(make: Callable[..., Sequence[Sequence[object]]]) -> Callable[..., Tables]:
    """A function that gives `make(*key)`, lists of (lists of) integers, as int32 tensors on the device named last.

    The newest are kept, for the next layer asks for the same. Python may let go of a table before a kernel has read
    it: its memory is not given to others before the stream that reads it comes there, and never where a CUDA graph
    reads it, for nobody says when the graph is gone.

    Raises:
        UnsupportedError: a CUDA graph is being captured, into which no new table can be copied.
    """
    newest: OrderedDict[Hashable, Tables] = OrderedDict()
    of_graphs: dict[Hashable, Tables] = {}
    lock = threading.Lock()

    def tables(*arguments: Hashable) -> Tables:
        *key, device = arguments
        assert isinstance(device, torch.device)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with lock:
            found = newest.get(arguments) or of_graphs.get(arguments)
            if found is None and capturing:
                raise UnsupportedError(
                    "a CUDA graph is being captured: packed sequences and offsets of these lengths must have been "
                    "computed once before, so that their tables are on the device"
                )
            if found is None:
                found = tuple(torch.tensor(table, dtype=torch.int32, device=device) for table in make(*key))
            newest[arguments] = found
            newest.move_to_end(arguments)
            if len(newest) > NEWEST:
                newest.popitem(last=False)
            if capturing:
                of_graphs[arguments] = found
        if device.type == "cuda" and not capturing:
            for table in found:
                table.record_stream(torch.cuda.current_stream(device))
        return found

    return tables
