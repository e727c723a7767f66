"""The small calls that run under compute-sanitizer: each kernel, on tiles that are not full."""

from __future__ import annotations

import sys

import torch

from attncap import attention
from benchmarks.qualify.place import Place
from benchmarks.qualify.scenarios import SCENARIOS, Sizes, names

CALLS = (
    *("D 64 causal", "tags, features, sinks, query mask", "float mask", "decoding 5 rows, top 64", "equal scores"),
    *("D 256 causal", "softcap", "sinks, query mask"),
)
SIZES = Sizes(batch=1, rows=150, long=1100, few=37, most_dim=64, topk=8, most_topk=64)


def call(place: Place, name: str) -> None:
    torch.manual_seed(0)
    case = SCENARIOS[name](SIZES).as_dtype(place.dtypes[-1]).to(place.device)
    attention(case.query, case.key, case.value, case.spec, impl=place.impl, **case.kwargs)
    place.wait()


def calls(place: Place) -> list[str]:
    """What is run of a place's kernels."""
    return [name for name in CALLS if name in names(place)]


if __name__ == "__main__":
    here = Place(dry=False, impl=sys.argv[1])
    for each in calls(here):
        call(here, each)
