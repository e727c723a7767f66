"""Work spread over processes: each compiles kernels on a core of its own, and they share the GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from benchmarks.qualify.place import Place

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(place: Place, work: Callable[[Place, Item], Result], items: Iterable[Item]) -> list[Result]:
    """work(place, item) of every item, in order. The caller must not have touched the GPU: its processes are forks."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(
        place.processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        waiting = [pool.submit(work, place, item) for item in items]
        return [one.result() for one in waiting]
