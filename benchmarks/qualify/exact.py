"""Exactness: every dtype, option and statistic against the float64 reference on the same device."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from attncap import HeadStats, StatSpec, attention, attention_varlen
from benchmarks.qualify.place import Place
from benchmarks.qualify.pool import spread
from benchmarks.qualify.scenarios import names, scenario
from tests.budget import assert_matches_float64
from tests.cases import Case, Sizes, cuda_case, random_case
from tests.derivatives import assert_gradients_match_float64

RANDOM, PACKED = "random call", "packed sequences"
SEED = 20
# What the interpreter, which is slow, is asked in a dry run; the tests ask it for the rest.
DRY = ("D 64 causal", "decoding 1 row", "float mask", "no keys", PACKED, RANDOM)
BACKWARDS = (
    *("D 16", "D 64 causal", "D 128", "D 128 causal", "D 256 causal", "D 80, value 48, softcap", "window"),
    *("causal window, negative scale", "bool mask", "float mask", "tags, features, sinks, query mask", "strides"),
)
ROUNDINGS = 8  # of a gradient, to the dtype of the call, relative to the largest

WIDE = Sizes(longest=700, dims=(1, 16, 33, 64, 80, 128, 256), value_dims=(5, 16, 64, 70, 128, 256), features=(3, 35))
TINY = Sizes((1,), (1,), (1, 2), rows=(7,), longest=7, dims=(16,), value_dims=(8,))


@dataclass(frozen=True)
class Check:
    """One call to be made and judged."""

    name: str
    dtype: torch.dtype
    seed: int
    backward: bool = False

    def __str__(self) -> str:
        name = f"backward of {self.name}" if self.backward else self.name
        return f"{name}, {str(self.dtype).removeprefix('torch.')}, seed {self.seed}"


def run(place: Place) -> dict[str, Any]:
    """All checks; those that failed with their seed and numbers."""
    known = [*names(place), PACKED, RANDOM]
    if place.dry:
        checks = [Check(name, place.dtypes[0], SEED) for name in DRY if name in known]
        checks.append(Check(BACKWARDS[1], place.dtypes[0], SEED, backward=True))
    else:
        checks = [Check(name, dtype, SEED) for name in known[:-1] for dtype in place.dtypes]
        checks += [Check(RANDOM, dtype, seed) for seed in range(14) for dtype in place.dtypes]
        checks += [
            Check(name, dtype, SEED, backward=True) for name in BACKWARDS if name in known for dtype in place.dtypes
        ]
    verdicts = spread(place, verdict, checks)
    failed = {str(check): why for check, why in zip(checks, verdicts, strict=True) if why}
    return {"passed": not failed, "checks": len(checks), "failed": failed}


def verdict(place: Place, check: Check) -> str | None:
    """What is wrong with a call, or None."""
    try:
        if check.backward:
            case = scenario(place, check.name, check.dtype, check.seed)
            assert_gradients_match_float64(case, place.impl, roundings=ROUNDINGS)
        else:
            with torch.no_grad():
                _packed(place, check) if check.name == PACKED else _dense(place, check)
        place.wait()
    except Exception as error:
        return "".join(traceback.format_exception_only(error)).strip()
    return None


def _dense(place: Place, check: Check) -> None:
    if check.name == RANDOM:
        draw = cuda_case if place.impl == "cuda" else random_case
        case = draw(check.seed, dtype=check.dtype, sizes=TINY if place.dry else WIDE).to(place.device)
    else:
        case = scenario(place, check.name, check.dtype, check.seed)
    out, stats = attention(case.query, case.key, case.value, case.spec, impl=place.impl, **case.kwargs)
    assert_matches_float64(out, stats, case, roundings=2)


def _packed(place: Place, check: Check) -> None:
    """Each packed sequence gives what it gives by itself; some are empty, some have no keys."""
    torch.manual_seed(check.seed)
    longest = place.size(700, 11)
    dim = place.size(64, place.smallest_dim)
    rows, keys = [0, 1, 17, longest, longest // 3], [5, 1, 0, longest, longest // 2]
    bounds_q, bounds_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (rows, keys))
    query = torch.randn(sum(rows), 4, dim, dtype=check.dtype, device=place.device)
    key, value = torch.randn(2, sum(keys), 2, dim, dtype=check.dtype, device=place.device)
    options: dict[str, Any] = {"causal": True, "window": (200, -1)}
    spec = StatSpec.all(topk=5)
    out, stats = attention_varlen(query, key, value, bounds_q, bounds_k, spec, impl=place.impl, **options)
    for (q0, q1), (k0, k1) in zip(pairwise(bounds_q.tolist()), pairwise(bounds_k.tolist()), strict=True):
        one = (tensor.transpose(0, 1)[None] for tensor in (query[q0:q1], key[k0:k1], value[k0:k1]))
        part = HeadStats(
            **{
                name: tensor[None, :, k0:k1] if name == "received_mass" else tensor[None, :, q0:q1]
                for name, tensor in stats.items()
            }
        )
        assert_matches_float64(out[q0:q1].transpose(0, 1)[None], part, Case(*one, spec, options), roundings=2)
