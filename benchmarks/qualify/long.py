"""One causal layer of 1,048,576 tokens, 32 query heads on 8 key heads, D 128: time, memory, and rows looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncap import HeadStats, StatSpec, attention
from benchmarks.qualify.clock import memory_and_seconds
from benchmarks.qualify.place import Place
from tests.budget import assert_matches_float64
from tests.cases import Case

FEW, TOP8 = "lse, max, entropy, sink, diagonal, offsets", "with top 8"
SPECS = {FEW: StatSpec(topk=0, offsets=(-1,)), TOP8: StatSpec(offsets=(-1,))}
ROWS_CHECKED = 3


def run(place: Place) -> dict[str, Any]:
    """Seconds and bytes of each, with what is wrong in the rows looked at."""
    tokens, dim = place.size(1 << 20, 70), place.size(128, place.smallest_dim)
    heads, key_heads = place.size(32, 2), place.size(8, 1)
    torch.manual_seed(50)
    make = {"dtype": place.dtypes[-1], "device": place.device}
    query = torch.randn(1, heads, tokens, dim, **make)
    key, value = (torch.randn(1, key_heads, tokens, dim, **make) for _ in range(2))
    flops = 4.0 * heads * tokens**2 * dim / 2
    figures, wrong = {}, {}
    for name, spec in SPECS.items():
        if not place.dry:  # a short call first, so that compiling is not timed
            attention(query[:, :, :4096], key[:, :, :4096], value[:, :, :4096], spec, causal=True, impl=place.impl)
        call = lambda spec=spec: attention(query, key, value, spec, causal=True, impl=place.impl)  # noqa: E731
        (out, stats), seconds, beyond = memory_and_seconds(place, call)
        figures[name] = {"seconds": seconds, "TFLOP/s": flops / seconds / 1e12, "bytes beyond outputs": beyond}
        for row in (0, tokens // 3, tokens - ROWS_CHECKED):
            failure = _wrong_rows(query, key, value, spec, out, stats, row)
            if failure:
                wrong[f"{name}, rows {row} to {row + ROWS_CHECKED - 1}"] = failure
    sizes = {"tokens": tokens, "query heads": heads, "key heads": key_heads, "D": dim}
    return {"passed": not wrong, "sizes": sizes, "figures": figures, "wrong": wrong}


def _wrong_rows(
    query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, out: Tensor, stats: HeadStats, row: int
) -> str | None:
    """What differs from float64 in a few rows of the first key head's query heads, or None."""
    rows, heads = slice(row, row + ROWS_CHECKED), slice(0, query.shape[1] // key.shape[1])
    kwargs = {"causal": True, "query_offset": row}
    case = Case(query[:, heads, rows], key[:, :1], value[:, :1], spec, kwargs)
    part = HeadStats(**{name: tensor[:, heads, rows] for name, tensor in stats.items()})
    try:
        assert_matches_float64(out[:, heads, rows], part, case, roundings=2)
    except AssertionError as error:
        return str(error)
    return None
