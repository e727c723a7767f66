"""attncap.scaled_dot_product_attention means what torch's own function means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attncap import UnsupportedError, scaled_dot_product_attention

CALLS: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), {}),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), {"is_causal": True}),
    ((2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 8), {"is_causal": True}),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), {"scale": 0.3}),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), {"attn_mask": torch.rand(5, 7) < 0.7}),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), {"attn_mask": torch.randn(2, 1, 5, 7)}),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), {"attn_mask": torch.randn(3, 1, 7)}),
    ((6, 5, 8), (6, 7, 8), (6, 7, 8), {"attn_mask": torch.randn(6, 5, 7)}),
    ((6, 5, 8), (6, 7, 8), (6, 7, 8), {"is_causal": True}),
    ((5, 8), (7, 8), (7, 8), {}),
    ((5, 8), (7, 8), (7, 8), {"attn_mask": torch.randn(5, 7)}),
    ((5, 8), (0, 8), (0, 6), {}),
    ((2, 0, 8), (2, 3, 8), (2, 3, 8), {}),
    ((4, 5, 8), (2, 7, 8), (2, 7, 8), {"enable_gqa": True}),
    ((4, 5, 8), (1, 7, 8), (1, 7, 8), {"enable_gqa": True, "attn_mask": torch.randn(4, 5, 7)}),
    ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8), {"attn_mask": torch.randn(2, 1, 1, 5, 7)}),
    ((2, 2, 3, 5, 8), (1, 2, 3, 7, 8), (2, 1, 3, 7, 8), {"attn_mask": torch.randn(3, 5, 7)}),
    ((2, 3, 5, 8), (1, 3, 7, 8), (2, 1, 7, 8), {}),
    ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), {"enable_gqa": True}),
    ((2, 6, 5, 8), (2, 2, 7, 8), (2, 3, 7, 8), {"enable_gqa": True}),
    ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), {"enable_gqa": True, "is_causal": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("query", "key", "value", "options"), CALLS)
def test_equal_to_torch(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=dtype) for shape in (query, key, value)]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.to(dtype)}
    expected = F.scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(scaled_dot_product_attention(*tensors, **options), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 0.1}, UnsupportedError, "dropout_p: attncap has no dropout, expected 0.0, got 0.1"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p: expected a probability from 0 to 1, got 2.0"),
        ({"is_causal": True, "attn_mask": torch.ones(5, 5)}, ValueError, "attn_mask: expected None together with"),
        ({"attn_mask": torch.ones(4, 5)}, ValueError, "attn_mask: expected a shape broadcastable"),
        ({"key": torch.randn(4, 3, 5, 8)}, ValueError, "key, value: expected leading dimensions that broadcast"),
        ({"key": torch.randn(8)}, ValueError, "key: expected at least 2 dimensions"),
        ({"is_causal": 1}, TypeError, "is_causal: expected a bool, got int"),
        ({"enable_gqa": "no"}, TypeError, "enable_gqa: expected a bool, got str"),
        ({"key": None}, TypeError, "key: expected a torch.Tensor, got NoneType"),
        ({"key": torch.randn(2, 2, 5, 8), "enable_gqa": True}, ValueError, "key: expected a number of heads that"),
    ],
)
def test_bad_calls_are_refused_by_name(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.randn(2, 3, 5, 8) for name in ("query", "key", "value")}
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**(arguments | options))


def test_torch_compile_takes_it_whole() -> None:
    query, key, value = torch.randn(3, 2, 3, 5, 8)

    def step(query: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query.sin(), key, value, is_causal=True)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(query), step(query))
    query.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(one(query).square().sum(), query) for one in (compiled, step))
    torch.testing.assert_close(found, expected)
