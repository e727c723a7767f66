"""Timing: CUDA events, turns taken, caches emptied; and the memory that a call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.qualify.place import Place

FLUSH_BYTES = 1 << 28  # more than the caches of any GPU hold
HEAD_START = 2_000_000  # clock cycles, about a millisecond: launches are queued before the timed work begins

Call = Callable[[], Any]


def medians(place: Place, contestants: dict[str, Call], rounds: int) -> dict[str, float]:
    """Milliseconds of each: the median of `rounds` turns (A B C A B C ...) after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    once = _once_dry if place.dry else _Once(place)
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            milliseconds = once(call)
            if turn:
                times[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in times.items()}


def host_microseconds(place: Place, call: Call, calls: int) -> float:
    """What a call costs before the GPU has anything to do, the mean of `calls`."""
    call()
    place.wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    took = time.perf_counter() - start
    place.wait()
    return 1e6 * took / calls


def memory_and_seconds(place: Place, call: Call) -> tuple[Any, float, int | None]:
    """(what the call gives, seconds of this one call, bytes at its peak beyond what stood before and what it gives)."""
    if place.dry:
        start = time.perf_counter()
        result = call()
        return result, time.perf_counter() - start, None
    place.wait()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = call()
    place.wait()
    seconds = time.perf_counter() - start
    return result, seconds, torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


def _once_dry(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


class _Once:
    """One timed call on a GPU."""

    def __init__(self, place: Place) -> None:
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=place.device)

    def __call__(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(HEAD_START)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
