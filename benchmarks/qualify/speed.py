"""Timings against torch's attention, with memory: medians of turns taken by all contestants of a shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

import attncap
from attncap import StatSpec
from benchmarks.qualify import backwards
from benchmarks.qualify.clock import host_microseconds, medians, memory_and_seconds
from benchmarks.qualify.peers import BACKENDS, FEW, PLAIN, TOP8, Contest, contestants, contests
from benchmarks.qualify.place import Place
from benchmarks.qualify.pool import spread


def run(place: Place) -> dict[str, Any]:
    """Figures of every shape, and attncap's TFLOP/s by head dim, which is what `auto` goes by."""
    all_contests = contests(place)
    refusals = spread(place, refused, all_contests)  # compiles everything, on all cores
    shapes = {
        contest.name: measure(place, contest, without) for contest, without in zip(all_contests, refusals, strict=True)
    }
    return {"passed": True, "shapes": shapes, "TFLOP/s": _by_head_dim(all_contests, shapes), "host": host_cost(place)}


def refused(place: Place, contest: Contest) -> dict[str, str]:
    """Peers that do not serve a shape, and what they say. A failure of attncap's own is one."""
    said = {name: _refusal(place, name, call) for name, call in contestants(place, contest).items()}
    return {name: why for name, why in said.items() if why}


@torch.no_grad()
def _refusal(place: Place, name: str, call: Callable[[], Any]) -> str | None:
    try:
        call()
        place.wait()
    except Exception as error:
        if name.startswith("attncap"):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


@torch.no_grad()
def measure(place: Place, contest: Contest, without: dict[str, str]) -> dict[str, Any]:
    """Milliseconds, TFLOP/s, bytes beyond outputs, and ratios to the fastest peer."""
    shape = contest.shape
    calls = {name: call for name, call in contestants(place, contest).items() if name not in without}
    memory = {name: memory_and_seconds(place, call)[2] for name, call in calls.items()}
    milliseconds = medians(place, calls, place.size(11, 1))
    figures = {
        name: {"ms": ms, "TFLOP/s": contest.flops / ms / 1e9, "bytes beyond outputs": memory[name]}
        for name, ms in milliseconds.items()
    }
    fastest = min((ms for name, ms in milliseconds.items() if name in BACKENDS), default=None)
    own = [name for name in (PLAIN, FEW, TOP8, backwards.ALONE, backwards.WITH_FEW) if name in milliseconds]
    ratios = {} if fastest is None else {name: fastest / milliseconds[name] for name in own}
    return {"shape": asdict(shape), "figures": figures, "fastest SDPA / it": ratios, "refused": without}


def _by_head_dim(all_contests: list[Contest], shapes: dict[str, Any]) -> dict[str, float]:
    """TFLOP/s with the few statistics and the top 8, the mean over the longest square calls of each head dim."""
    rates: dict[int, dict[int, list[float]]] = {}
    for contest in all_contests:
        shape = contest.shape
        if shape.rows is None and shape.key_heads is None and not contest.backward:
            rate = shapes[contest.name]["figures"][TOP8]["TFLOP/s"]
            rates.setdefault(shape.dim, {}).setdefault(shape.keys, []).append(rate)
    longest = {dim: by_keys[max(by_keys)] for dim, by_keys in rates.items()}
    return {str(dim): sum(values) / len(values) for dim, values in sorted(longest.items())}


@torch.no_grad()
def host_cost(place: Place) -> dict[str, float]:
    """Microseconds of the processor for one small call."""
    dtype = place.dtypes[-1]
    rows, dim = place.size(128, 16), place.size(64, place.smallest_dim)
    query, key, value = torch.randn(3, 1, 8, rows, dim, dtype=dtype, device=place.device)

    def ours(spec: StatSpec) -> Callable[[], Any]:
        return lambda: attncap.attention(query, key, value, spec, impl=place.impl)

    calls: dict[str, Callable[[], Any]] = {
        "no statistics [us]": ours(StatSpec.none()),
        "default [us]": ours(StatSpec()),
    }
    calls["SDPA [us]"] = lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return {name: host_microseconds(place, call, place.size(200, 1)) for name, call in calls.items()}
