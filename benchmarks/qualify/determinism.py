"""Determinism: the same call gives the same bits, however the GPU schedules it."""

from __future__ import annotations

from typing import Any

import torch

from attncap import attention
from benchmarks.qualify.place import Place
from benchmarks.qualify.pool import spread
from benchmarks.qualify.scenarios import names, scenario
from tests.derivatives import gradients_of

CALLS = ("D 64 causal", "D 128", "decoding 1 row", "long rows, top 64", "blocks of equal scores", "float mask")
BACKWARDS = ("D 64 causal", "D 128", "float mask")
SEED = 30


def run(place: Place) -> dict[str, Any]:
    """Statistics whose bits differed between repeats, by call."""
    calls = [name for name in CALLS if name in names(place)] if not place.dry else ["decoding 1 row"]
    repeats = place.size(12, 2)
    found = spread(place, differing, [(name, repeats) for name in calls])
    differ = {name: names for name, names in zip(calls, found, strict=True) if names}
    return {"passed": not differ, "calls": len(calls), "repeats": repeats, "differ": differ}


def differing(place: Place, call: tuple[str, int]) -> list[str]:
    """Names of results that differ. Every other repeat runs beside other work, which changes who comes first."""
    name, repeats = call
    case = scenario(place, name, place.dtypes[-1], SEED)
    wanted, differ = None, set()
    for repeat in range(repeats):
        if repeat % 2 and not place.dry:
            with torch.cuda.stream(torch.cuda.Stream()):
                noise = torch.randn(4096, 4096, device=place.device)
                for _ in range(4):
                    noise = noise @ noise
        out, stats = attention(case.query, case.key, case.value, case.spec, impl=place.impl, **case.kwargs)
        found = {"out": out, **dict(stats.items())}
        if name in BACKWARDS:
            found |= {f"gradient of {one}": tensor for one, tensor in gradients_of(case, place.impl).items()}
        place.wait()
        wanted = wanted or found
        differ |= {key for key, tensor in found.items() if not torch.equal(tensor, wanted[key])}
    return sorted(differ)
