"""The Triton kernels, interpreted on the CPU, against the float64 reference.

Never in bfloat16: Triton's interpreter multiplies its matrices wrongly. What needs few tiles is in test_attention.py,
with the other implementations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attncap
from attncap import HeadStats, StatSpec, attention, attention_varlen
from tests.budget import assert_matches_float64
from tests.cases import SMALL, Case, random_case
from tests.test_ops import record_calls

# numpy warns of overflows and of NaN where a GPU computes on.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALF = torch.float16


def check(case: Case) -> tuple[Tensor, HeadStats]:
    """What the kernels give, once it is known to be right."""
    out, stats = attention(case.query, case.key, case.value, case.spec, impl="triton", **case.kwargs)
    assert attncap.last_impl() == "triton"
    assert_matches_float64(out, stats, case, roundings=2)
    return out, stats


def plain_case(rows: int, keys: int, spec: StatSpec = StatSpec(), *, heads: int = 1, **kwargs: Any) -> Case:  # noqa: B008
    torch.manual_seed(rows + keys)
    query, key, value = torch.randn(1, heads, rows, 16), torch.randn(1, 1, keys, 16), torch.randn(1, 1, keys, 20)
    return Case(query, key, value, spec, kwargs)


@pytest.mark.parametrize("seed", range(16))
def test_random_calls_match_the_reference(seed: int) -> None:
    check(random_case(seed, dtype=HALF if seed % 2 else torch.float32, sizes=SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 256), (17, 1), (100, 130), (256, 65)])
def test_head_dims_that_are_no_power_of_two(dtype: torch.dtype, dim: int, value_dim: int) -> None:
    torch.manual_seed(dim)
    query, key, value = torch.randn(1, 1, 19, dim), torch.randn(1, 1, 45, dim), torch.randn(1, 1, 45, value_dim)
    check(Case(query, key, value, StatSpec.all(topk=3), {"causal": True}).as_dtype(dtype))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("query_offset", [None, 300])
def test_keys_split_over_programs(rows: int, query_offset: int | None) -> None:
    """Few rows on many keys, heads of a group in one tile; some parts hold no key that a row sees."""
    spec = StatSpec.all(topk=4, offsets=(-1, 2))
    torch.manual_seed(rows)
    case = plain_case(
        rows,
        600,
        spec,
        heads=3,
        causal=True,
        window=(250, -1),
        query_offset=query_offset,
        sink_logits=torch.randn(3),
        query_tags=torch.randint(0, 3, (2, 1, rows)),
        key_tags=torch.randint(-1, 3, (2, 1, 600)),
        key_features=torch.randn(1, 600, 3),
        query_mask=torch.arange(rows)[None] != 1,
    )
    check(case)


@pytest.mark.parametrize("shape", [(2, 3, 7, 40), (1, 3, 7, 1), (2, 1, 1, 40), (7, 40), (40,), (3, 1, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_in_every_broadcast_form(shape: tuple[int, ...], kind: str) -> None:
    torch.manual_seed(len(shape))
    query, key, value = torch.randn(2, 3, 7, 8), torch.randn(2, 1, 40, 8), torch.randn(2, 1, 40, 8)
    mask = torch.rand(shape) < 0.8
    bias = torch.randn(shape).masked_fill(~mask, -torch.inf)
    check(Case(query, key, value, StatSpec.all(topk=2), {"attn_mask": mask if kind == "bool" else bias}))


@pytest.mark.parametrize("sink", [None, torch.tensor([0.5])])
def test_masks_of_the_smallest_float(sink: Tensor | None) -> None:
    """As Transformers makes them: a row with nothing else sees all its keys alike."""
    mask = torch.zeros(35, 70).masked_fill(torch.rand(35, 70) < 0.3, torch.finfo(torch.float32).min)
    mask[3] = mask[34] = mask[20, :40] = torch.finfo(torch.float32).min
    check(plain_case(35, 70, StatSpec.all(topk=4), attn_mask=mask, sink_logits=sink))


def test_masks_and_inputs_of_any_strides() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(20, 16, 1, 2), torch.randn(1, 50, 2, 16), torch.randn(2, 1, 16, 50)
    mask = (torch.rand(50, 20) < 0.8).T
    assert not mask.is_contiguous()
    tensors = (query.permute(2, 3, 0, 1), key.transpose(1, 2), value.permute(1, 0, 3, 2))
    check(Case(*tensors, StatSpec.all(topk=4), {"attn_mask": mask, "query_mask": torch.rand(40)[::2][None] < 0.5}))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_steps_within_a_tile_beyond_32_bits(name: str) -> None:
    """Rows that are one: a stride of 2^31 elements over memory that is reserved and hardly touched."""
    case = plain_case(3, 3, StatSpec.all(topk=2))
    tensor = getattr(case, name)
    far = torch.empty(2 * 2**31 + 32, dtype=HALF).as_strided(tensor.shape, (0, 0, 2**31, 1))
    far.copy_(tensor)
    case = case.as_dtype(HALF)
    setattr(case, name, far)
    check(case)


@pytest.mark.parametrize("scale", [0.0, -1.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scales_of_no_and_of_the_other_sign(scale: float, softcap: float | None) -> None:
    case = plain_case(20, 50, StatSpec.all(topk=4), scale=scale, softcap=softcap, sink_logits=torch.tensor([0.5]))
    check(case)


def test_more_tags_and_features_than_one_walk_takes() -> None:
    torch.manual_seed(0)
    tags = torch.randint(0, 3, (6, 1, 18)) + 2**40  # wider than 32 bits: equal in their lower half, so as not to match
    key_tags = torch.randint(0, 3, (6, 1, 40)) + 2**40
    key_tags[:, :, ::3] -= 2**39
    key_tags[:, :, 1::5] = -1
    check(plain_case(18, 40, query_tags=tags, key_tags=key_tags, key_features=torch.randn(1, 40, 35)))


@pytest.mark.parametrize(
    ("topk", "order"),
    [
        (1, "random"),
        (33, "ties"),
        *((topk, order) for topk in (7, 64) for order in ("rising", "random", "ties", "equal")),
    ],
)
def test_topk_with_lists_that_overflow(topk: int, order: str) -> None:
    torch.manual_seed(topk)
    scores = {
        "rising": torch.arange(300.0) / 10,
        "random": torch.randn(300),
        "ties": torch.randint(0, 3, (300,)).float(),
        "equal": torch.zeros(300),
    }[order]
    query, key = torch.ones(1, 1, 18, 1), scores.view(1, 1, -1, 1)
    _, stats = attention(query, key, key, StatSpec(topk=topk), scale=1.0, causal=True, impl="triton")
    assert stats.topk_index is not None
    for row, sees in ((0, 283), (17, 300)):
        best = scores[:sees].sort(descending=True, stable=True).indices[:topk]
        assert stats.topk_index[0, 0, row].tolist() == best.tolist()


def test_the_same_call_gives_the_same_bits() -> None:
    case = plain_case(40, 300, StatSpec.all(topk=8), causal=True)
    (out, stats), (again, more) = check(case), check(case)
    assert torch.equal(out, again)
    for (name, one), (_, other) in zip(stats.items(), more.items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("query_offset", [None, 3])
def test_packed_sequences_match_the_reference(query_offset: int | None) -> None:
    """Some have no rows, some no keys, some neither."""
    torch.manual_seed(0)
    bounds_q, bounds_k = [0, 20, 20, 25, 25, 60], [0, 33, 40, 40, 40, 110]
    query, key, value = torch.randn(60, 2, 16), torch.randn(110, 1, 16), torch.randn(110, 1, 9)
    kwargs: dict[str, Any] = {
        "causal": True,
        "window": (20, -1),
        "sink_logits": torch.randn(2),
        "query_mask": torch.rand(60) < 0.8,
        "query_tags": torch.randint(0, 3, (2, 60)),
        "key_tags": torch.randint(-1, 3, (2, 110)),
        "key_features": torch.randn(110, 3),
        "query_offset": query_offset,
    }
    spec = StatSpec.all(topk=5)
    out, stats = attention_varlen(query, key, value, bounds_q, bounds_k, spec, impl="triton", **kwargs)
    want_out, want = attention_varlen(query, key, value, bounds_q, bounds_k, spec, impl="reference", **kwargs)
    torch.testing.assert_close(out, want_out, rtol=1e-5, atol=1e-6)
    for (name, got), (_, expected) in zip(stats.items(), want.items(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rows", [3, 40])
def test_infinite_inputs_end(rows: int) -> None:
    """Nothing is promised of their numbers but that the selection of the top k comes to an end."""
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 1, rows, 8), torch.randn(2, 1, 1, 300, 8)
    query[0, 0, 0] = torch.nan
    query[0, 0, 1, 0] = torch.inf
    key[0, 0, 7] = torch.nan
    key[0, 0, 280:] = -torch.inf
    out, stats = attention(query, key, value, StatSpec.all(topk=64), impl="triton")
    assert out.shape == (1, 1, rows, 8)
    assert stats.lse.isnan().any()


@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim", "why"),
    [
        (torch.float64, 8, 8, "float32, bfloat16 and float16, got torch.float64"),
        (torch.float32, 257, 8, "head dims up to 256, got 257 and 8"),
        (torch.float32, 8, 300, "head dims up to 256, got 8 and 300"),
    ],
)
def test_what_cannot_be_served_is_named(dtype: torch.dtype, dim: int, value_dim: int, why: str) -> None:
    query, value = torch.randn(1, 1, 2, dim, dtype=dtype), torch.randn(1, 1, 2, value_dim, dtype=dtype)
    with pytest.raises(NotImplementedError, match=f"impl='triton' cannot serve this call.*{why}"):
        attention(query, query, value, impl="triton")


def test_opcheck_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(5, 2, 8), torch.randn(7, 1, 8)
    with monkeypatch.context() as patch:
        dense, packed = record_calls(patch, "attention"), record_calls(patch, "attention_varlen")
        attention(
            query.transpose(0, 1)[None], key[None, :, 0, None].transpose(1, 2), key[None].transpose(1, 2), impl="triton"
        )
        attention_varlen(query, key, key, [0, 2, 5], [0, 3, 7], impl="triton")
    torch.library.opcheck(torch.ops.attncap.attention.default, dense[0])
    torch.library.opcheck(torch.ops.attncap.attention_varlen.default, packed[0])


def test_torch_compile_keeps_out_and_statistics() -> None:
    def step(query: Tensor, key: Tensor) -> tuple[Tensor, HeadStats]:
        out, stats = attention(query * 2, key, key, StatSpec.all(topk=2), causal=True, impl="triton")
        return out + 1, stats

    query, key = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 9, 8)
    (out, stats), (plain_out, plain) = (
        torch.compile(step, fullgraph=True, backend="aot_eager")(query, key),
        step(query, key),
    )
    torch.testing.assert_close(out, plain_out)
    for (name, got), (_, want) in zip(stats.items(), plain.items(), strict=True):
        torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")
