"""received_mass of the CUDA kernels, on the model of a GPU, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attncap import HeadStats, StatSpec, attention, attention_varlen
from tests.budget import FACTOR, FLOOR, assert_within, difference, worst

SPEC = replace(StatSpec.none(), received=True)
HALF, BFLOAT = torch.float16, torch.bfloat16

Attend = Callable[..., tuple[Tensor, HeadStats]]


pytestmark = pytest.mark.usefixtures("cuda_model")


def check(tensors: tuple[Tensor, Tensor, Tensor], *lengths: list[int], **kwargs: Any) -> Tensor:
    """What the kernel gives, once it is known to be within the budget of float32's own error."""
    attend: Attend = attention_varlen if lengths else attention
    by_dtype = {}
    for dtype in (torch.float64, torch.float32):
        given = (tensor.to(dtype) for tensor in tensors)
        _, stats = attend(*given, *lengths, SPEC, impl="reference", **kwargs)
        assert stats.received_mass is not None
        by_dtype[dtype] = stats.received_mass
    got = attend(*tensors, *lengths, SPEC, impl="cuda", **kwargs)[1].received_mass
    assert got is not None
    want = by_dtype[torch.float64]
    allowed = FACTOR * worst(difference(by_dtype[torch.float32], want)) + FLOOR[torch.float32] * max(1.0, worst(want))
    assert_within("received_mass", got, want, allowed)
    return got


def random_tensors(
    heads: int, key_heads: int, rows: int, keys: int, dim: int, dtype: torch.dtype = BFLOAT, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows + keys + dim)
    key, value = torch.randn(2, batch, key_heads, keys, dim).to(dtype)
    return torch.randn(batch, heads, rows, dim).to(dtype), key, value


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_instance(dtype, dim):
    check(random_tensors(2, 1, 70, 90, dim, dtype), causal=True)
    check(random_tensors(1, 1, 40, 50, dim, dtype), softcap=2.0)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 300), (64, 256), (65, 257), (200, 31), (300, 513)])
def test_ends_that_are_no_whole_tile(rows, keys):
    check(random_tensors(1, 1, rows, keys, 64))


@pytest.mark.parametrize(
    ("window", "causal"),
    [((3, 0), False), ((10, 4), False), ((-1, 2), False), ((70, -1), False), ((0, 0), True), ((130, -1), True)],
)
@pytest.mark.parametrize("query_offset", [None, 0, 40, -60])
def test_windows(window, causal, query_offset):
    """Blocks of rows that see a tile of keys whole, in part and not at all; rows that see no key."""
    tensors = random_tensors(1, 1, 330, 290, 64)
    check(tensors, window=window, causal=causal, query_offset=query_offset)


@pytest.mark.parametrize("scale", [0.0, -0.7, 0.5, 40.0])
@pytest.mark.parametrize("softcap", [None, 1.5, 30.0])
def test_scales_and_softcaps(scale, softcap):
    check(random_tensors(1, 1, 40, 70, 64, HALF), scale=scale, softcap=softcap, causal=True)


def test_heads_of_groups_and_batches():
    got = check(random_tensors(6, 2, 50, 40, 64, batch=3), causal=True)
    assert got.shape == (3, 6, 40)


def test_rows_that_do_not_count():
    """Padding may hold anything, and be seen by anything that does not count either."""
    query, key, value = random_tensors(2, 1, 80, 80, 64, batch=2)
    counted = torch.arange(80)[None] < torch.tensor([[80], [33]])
    strided = torch.zeros(80, 4, dtype=torch.bool)
    strided[:, ::2] = counted.T
    check((query, key, value), causal=True, query_mask=strided[:, ::2].T)
    query[1, :, 40:] = torch.nan
    key[1, :, 40:] = torch.inf
    _, got = attention(query, key, value, SPEC, causal=True, query_mask=counted, impl="cuda")
    assert got.received_mass is not None
    assert got.received_mass.isfinite().all()
    assert (got.received_mass[1, :, 40:] == 0).all()


@pytest.mark.parametrize("query_offset", [None, 3])
def test_packed_sequences(query_offset):
    """Some have no rows, some no keys, some neither, some more keys than a tile."""
    torch.manual_seed(0)
    bounds_q, bounds_k = [0, 20, 20, 25, 25, 160], [0, 33, 40, 40, 40, 350]
    query, key, value = torch.randn(160, 4, 64), torch.randn(350, 2, 64), torch.randn(350, 2, 64)
    tensors = (query.to(BFLOAT), key.to(BFLOAT), value.to(BFLOAT))
    kwargs: dict[str, Any] = {"causal": True, "window": (200, -1), "query_offset": query_offset}
    check(tensors, bounds_q, bounds_k, query_mask=torch.rand(160) < 0.8, **kwargs)


def test_strides():
    """Heads last, and rows that lie far apart."""
    torch.manual_seed(0)
    query = torch.randn(2, 40, 3, 64).to(HALF).transpose(1, 2)
    key = torch.randn(2, 1, 90, 128).to(HALF)[..., 64:]
    value = torch.randn(2, 1, 90, 64).to(HALF)
    check((query, key, value))


def test_the_order_of_threads_does_not_matter(cuda_model):
    tensors = random_tensors(1, 1, 200, 300, 64)
    found = []
    for seed in range(6):
        cuda_model.set_seed(seed)
        found.append(check(tensors, causal=True))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_see(cuda_model, rows, keys):
    tensors = random_tensors(2, 1, rows, keys, 64)
    out, stats = attention(*tensors, StatSpec.all(), sink_logits=torch.zeros(2), impl="cuda")
    want_out, want = attention(*tensors, StatSpec.all(), sink_logits=torch.zeros(2), impl="reference")
    assert torch.equal(out, want_out)
    for (name, got), (_, expected) in zip(stats.items(), want.items(), strict=True):
        assert torch.equal(got, expected), name
