"""A call that has run once can be captured in a CUDA graph, and the graph serves new inputs."""

from __future__ import annotations

from typing import Any

import torch

from attncap import attention
from benchmarks.qualify.place import Place
from benchmarks.qualify.scenarios import scenario

CALLS = ("decoding 1 row", "D 128 causal")


def run(place: Place) -> dict[str, Any]:
    """Results of a replay that differ from those of the same call made eagerly, by call."""
    differ = {}
    for name in CALLS[: place.size(2, 1)]:
        found = _replayed(place, name)
        if found:
            differ[name] = found
    return {"passed": not differ, "differ": differ, "captured": not place.dry}


def _replayed(place: Place, name: str) -> list[str]:
    case = scenario(place, name, place.dtypes[-1], 40)
    fresh = [torch.randn_like(tensor) for tensor in (case.query, case.key, case.value)]

    def call() -> dict[str, torch.Tensor]:
        out, stats = attention(case.query, case.key, case.value, case.spec, impl=place.impl, **case.kwargs)
        return {"out": out, **dict(stats.items())}

    replay, results = (call, None) if place.dry else _capture(call)
    for tensor, new in zip((case.query, case.key, case.value), fresh, strict=True):
        tensor.copy_(new)
    results = replay() or results
    place.wait()
    wanted = call()
    return sorted(key for key, tensor in wanted.items() if not torch.equal(tensor, results[key]))


def _capture(call: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """(replay, where its results appear)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results
