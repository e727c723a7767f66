"""The Hopper forward, on the model of a GPU, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import attncap
from attncap import HeadStats, StatSpec, attention, attention_varlen
from tests.budget import assert_matches_float64
from tests.cases import Case, Sizes, cuda_case

HALF, BFLOAT = torch.float16, torch.bfloat16
DIMS = (64, 128, 256)
# Blocks have 128 rows, tiles 32 to 128 keys.
SIZES = Sizes(
    batches=(1, 2),
    groups=(1, 2),
    heads_of_group=(1, 2),
    rows=(0, 1, 2, 63, 64, 65, 127, 128, 129),
    longest=160,
)

pytestmark = pytest.mark.usefixtures("cuda_model")


def check(case: Case) -> tuple[Tensor, HeadStats]:
    """What the kernels give, once it is known to be right."""
    out, stats = attention(case.query, case.key, case.value, case.spec, impl="cuda", **case.kwargs)
    assert attncap.last_impl() == "cuda"
    assert_matches_float64(out, stats, case, roundings=2)
    return out, stats


def plain_case(
    rows: int, keys: int, spec: StatSpec, *, dim: int = 64, heads: int = 1, dtype: torch.dtype = HALF, **kwargs: Any
) -> Case:
    torch.manual_seed(rows + keys + dim)
    query, key, value = torch.randn(1, heads, rows, dim), torch.randn(1, 1, keys, dim), torch.randn(1, 1, keys, dim)
    return Case(query, key, value, spec, kwargs).as_dtype(dtype)


@pytest.mark.parametrize("seed", range(48))
def test_random_calls_match_the_reference(seed: int, cuda_model: ModuleType) -> None:
    cuda_model.set_seed(seed)
    check(cuda_case(seed, dtype=HALF if seed % 2 else BFLOAT, sizes=SIZES))


SPECS = [
    StatSpec.none(),
    StatSpec(topk=0),
    StatSpec(topk=8),
    StatSpec.all(topk=20, offsets=(-1, 1, 0, 40)),
]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("spec", SPECS, ids=["plain", "entropy", "topk", "everything"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_kernel_walks_several_tiles(dim: int, spec: StatSpec, causal: bool) -> None:
    check(plain_case(257, 391, spec, dim=dim, heads=2, causal=causal))


def test_the_order_of_threads_changes_no_bit(cuda_model: ModuleType) -> None:
    case = plain_case(130, 520, StatSpec.all(), heads=2, causal=True)
    first: list[Tensor] = []
    for seed in range(12):
        cuda_model.set_seed(seed)
        out, stats = attention(case.query, case.key, case.value, case.spec, impl="cuda", **case.kwargs)
        got = [out, *(tensor for _, tensor in stats.items())]
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True)), f"seed {seed}"


def by_score(rows: int, scores: Tensor, dim: int = 64) -> tuple[Tensor, Tensor]:
    """Queries and keys of which every row sees `scores`."""
    query, key = torch.zeros(1, 1, rows, dim), torch.zeros(1, 1, len(scores), dim)
    query[..., 0] = 1.0
    key[0, 0, :, 0] = scores
    return query, key


ORDERS = {
    "rising": torch.linspace(-4, 4, 700),
    "falling": torch.linspace(4, -4, 700),
    "equal": torch.full((700,), 0.5),
    "two values": torch.arange(700) % 2 * 1.0,
    "zeros of both signs": torch.where(torch.arange(700) % 3 == 0, -0.0, 0.0),
    "a step": (torch.arange(700) < 300) * 2.0,
    "all low": torch.full((700,), -6e4),
}


@pytest.mark.parametrize("topk", [1, 8, 9, 64])
@pytest.mark.parametrize("order", ORDERS)
def test_topk_where_lists_of_candidates_run_full(order: str, topk: int) -> None:
    """Every key reaches the bound, or many tie: lists are cut and the top k stays exact, ties by rising index."""
    scores = ORDERS[order].to(HALF).float()
    query, key = by_score(70, scores)
    case = Case(query, key, torch.randn(1, 1, 700, 64), StatSpec(topk=topk), {"scale": 1.0}).as_dtype(HALF)
    _, stats = check(case)
    want = sorted(range(700), key=lambda j: (-scores[j].item(), j))[:topk]
    assert stats.topk_index is not None
    assert stats.topk_index[0, 0].tolist() == [want] * 70


@pytest.mark.parametrize("topk", [8, 64])
def test_topk_of_rows_that_see_fewer_keys(topk: int) -> None:
    check(plain_case(140, 140, StatSpec(topk=topk), causal=True))
    check(plain_case(130, 5, StatSpec(topk=topk)))
    check(plain_case(130, 300, StatSpec(topk=topk), window=(2, 0)))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.1, 30.0])
def test_scales_of_every_sign(dtype: torch.dtype, scale: float) -> None:
    check(plain_case(70, 150, StatSpec.all(topk=4), dtype=dtype, scale=scale))


@pytest.mark.parametrize("spec", [StatSpec(), StatSpec.all()], ids=["topk", "everything"])
def test_packed_sequences(spec: StatSpec) -> None:
    """Sequences without rows or keys, blocks and tiles that end inside a neighbour."""
    torch.manual_seed(0)
    lengths_q, lengths_k = [0, 130, 1, 64, 200, 3], [5, 200, 1, 0, 200, 300]
    bounds_q, bounds_k = [0], [0]
    for rows, keys in zip(lengths_q, lengths_k, strict=True):
        bounds_q.append(bounds_q[-1] + rows)
        bounds_k.append(bounds_k[-1] + keys)
    query = torch.randn(bounds_q[-1], 4, 64).to(HALF)
    key, value = (torch.randn(bounds_k[-1], 2, 64).to(HALF) for _ in range(2))
    mask = torch.rand(bounds_q[-1]) < 0.8
    kwargs: dict[str, Any] = {"causal": True, "sink_logits": torch.randn(4)}
    out, stats = attention_varlen(query, key, value, bounds_q, bounds_k, spec, impl="cuda", query_mask=mask, **kwargs)
    for index, (rows, keys) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        own, seen = slice(bounds_q[index], bounds_q[index] + rows), slice(bounds_k[index], bounds_k[index] + keys)
        one = Case(
            query[own].transpose(0, 1)[None],
            key[seen].transpose(0, 1)[None],
            value[seen].transpose(0, 1)[None],
            replace(spec, received=False),
            kwargs | {"query_mask": mask[own][None]},
        )
        of_rows = {name: tensor[:, own][None] for name, tensor in stats.items() if name != "received_mass"}
        assert_matches_float64(out[own].transpose(0, 1)[None], HeadStats(**of_rows), one, roundings=2)


def test_packed_neighbours_that_hold_no_numbers_reach_nobody() -> None:
    """Tiles are wider than sequences: what lies past the last key is a neighbour's."""
    torch.manual_seed(0)
    bounds = [0, 40, 180, 200]
    query, key, value = (torch.randn(200, 2, 64).to(HALF) for _ in range(3))
    clean, clean_stats = attention_varlen(query, key, value, bounds, bounds, StatSpec.all(), impl="cuda")
    for tensor in (query, key, value):
        tensor[40:180] = torch.nan
    out, stats = attention_varlen(query, key, value, bounds, bounds, StatSpec.all(), impl="cuda")
    others = [*range(40), *range(180, 200)]
    assert torch.equal(out[others], clean[others])
    for name, got in stats.items():
        assert torch.equal(got[:, others], getattr(clean_stats, name)[:, others]), name


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("topk", [8, 64])
def test_numbers_that_are_none_reach_only_rows_that_see_them(bad: float, topk: int) -> None:
    case = plain_case(200, 200, StatSpec(topk=topk), causal=True)
    clean, clean_stats = check(case)
    key = case.key.clone()
    key[0, 0, 150:190, 3] = bad
    out, stats = attention(case.query, key, case.value, case.spec, impl="cuda", causal=True)
    assert torch.equal(out[:, :, :150], clean[:, :, :150])
    for (name, got), (_, want) in zip(stats.items(), clean_stats.items(), strict=True):
        assert torch.equal(got[:, :, :150], want[:, :, :150]), name


def test_values_that_are_no_numbers_leave_statistics_alone() -> None:
    case = plain_case(130, 130, StatSpec.all(), causal=True)
    _, want = check(case)
    value = case.value.clone()
    value[0, 0, 100] = torch.nan
    _, stats = attention(case.query, case.key, value, case.spec, impl="cuda", causal=True)
    for name, tensor in stats.items():
        assert torch.equal(tensor, getattr(want, name)), name
