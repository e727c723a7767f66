"""The small calls that run under compute-sanitizer: each kernel, on tiles that are not full."""

from __future__ import annotations

import torch

from attncap import attention
from benchmarks.qualify.place import Place
from benchmarks.qualify.scenarios import SCENARIOS, Sizes

CALLS = ("D 64 causal", "tags, features, sinks, query mask", "float mask", "decoding 5 rows, top 64", "equal scores")
SIZES = Sizes(batch=1, rows=150, long=1100, few=37, most_dim=64, topk=8, most_topk=64)


def call(place: Place, name: str) -> None:
    torch.manual_seed(0)
    case = SCENARIOS[name](SIZES).as_dtype(place.dtypes[-1]).to(place.device)
    attention(case.query, case.key, case.value, case.spec, impl="triton", **case.kwargs)
    place.wait()


if __name__ == "__main__":
    for each in CALLS:
        call(Place(dry=False), each)
