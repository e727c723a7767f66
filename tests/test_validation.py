"""Bad calls are refused with a message that names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attncap import StatSpec, UnsupportedError, attention, attention_varlen


def good() -> dict[str, Any]:
    return {"query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 2, 7, 8), "value": torch.randn(2, 2, 7, 6)}


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": np.zeros((2, 4, 5, 8))}, TypeError, "query: expected a torch.Tensor, got ndarray"),
    ({"query": torch.zeros(2, 4, 5, 8, dtype=torch.int64)}, TypeError, "query: expected float32.*got torch.int64"),
    ({"query": torch.zeros(4, 5, 8)}, ValueError, r"query: expected 4 dimensions.*got shape \(4, 5, 8\)"),
    ({"query": torch.zeros(2, 4, 5, 8).to_sparse()}, TypeError, "query: expected a dense tensor"),
    ({"query": torch.zeros(2, 3, 5, 8)}, ValueError, "key: expected a number of heads that .*3, got 2"),
    ({"query": torch.zeros(2, 0, 5, 8)}, ValueError, "key: expected a number of heads that divides"),
    ({"query": torch.zeros(2, 4, 5, 9)}, ValueError, "key: expected the query's head dim 9"),
    ({"query": torch.zeros(2, 4, 5, 0), "key": torch.zeros(2, 2, 7, 0)}, ValueError, "query: expected a head dim of"),
    ({"query": torch.zeros(2, 4, 5, 8, device="meta")}, ValueError, "key: expected the query's device meta, got cpu"),
    ({"key": torch.zeros(3, 2, 7, 8)}, ValueError, "key: expected the query's batch size 2"),
    ({"key": torch.zeros(2, 2, 7, 8, dtype=torch.float64)}, TypeError, "key: expected the query's dtype torch.float32"),
    ({"value": torch.zeros(2, 2, 6, 6)}, ValueError, "value: expected the key's heads and length"),
    ({"value": torch.zeros(2, 4, 7, 6)}, ValueError, "value: expected the key's heads and length"),
    ({"spec": "all"}, TypeError, "spec: expected a StatSpec, got str"),
    ({"causal": "yes"}, TypeError, "causal: expected a bool, got str"),
    ({"scale": "1"}, TypeError, "scale: expected a number or None, got str"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number .*got nan"),
    ({"window": 3}, TypeError, r"window: expected \(left, right\) or None, got 3"),
    ({"window": (1, 2, 3)}, ValueError, "window: expected .*got 3 entries"),
    ({"window": (None, 2)}, TypeError, "window: expected two ints"),
    ({"scale": 10**400}, ValueError, "scale: expected a finite number"),
    ({"scale": 1e39}, ValueError, "scale: expected a finite number within the range of float32"),
    ({"window": (-2, 0)}, ValueError, r"window: expected sides of at least 0.*got \(-2, 0\)"),
    ({"window": (1.5, 0)}, TypeError, "window: expected two ints"),
    ({"softcap": -1.0}, ValueError, "softcap: expected a positive number.*got -1.0"),
    ({"softcap": True}, TypeError, "softcap: expected a number"),
    ({"query_offset": 1.0}, TypeError, "query_offset: expected an int or None, got float"),
    ({"query_offset": 2**40}, ValueError, "query_offset: expected an int within"),
    ({"attn_mask": [True]}, TypeError, "attn_mask: expected a torch.Tensor, got list"),
    ({"attn_mask": torch.ones(5, 7, dtype=torch.int64)}, TypeError, "attn_mask: expected a bool or floating dtype"),
    ({"attn_mask": torch.ones(5, 6)}, ValueError, r"attn_mask: expected a shape broadcastable to \(2, 4, 5, 7\), got"),
    ({"attn_mask": torch.ones(1, 2, 4, 5, 7)}, ValueError, "attn_mask: expected a shape broadcastable"),
    ({"sink_logits": torch.zeros(3)}, ValueError, r"sink_logits: expected shape \(4\), got \(3,\)"),
    ({"sink_logits": torch.zeros(4, dtype=torch.int32)}, TypeError, "sink_logits: expected float32 or"),
    ({"query_mask": torch.ones(2, 5)}, TypeError, "query_mask: expected bool, got torch.float32"),
    ({"query_mask": torch.ones(2, 7, dtype=torch.bool)}, ValueError, r"query_mask: expected shape \(2, 5\)"),
    ({"query_tags": torch.ones(1, 2, 5, dtype=torch.int64)}, ValueError, "key_tags: expected together with query_tags"),
    ({"key_tags": torch.ones(1, 2, 7, dtype=torch.int64)}, ValueError, "query_tags: expected together with key_tags"),
    (
        {"query_tags": torch.ones(1, 2, 5), "key_tags": torch.ones(1, 2, 7)},
        TypeError,
        "query_tags: expected int64 or .*got torch.float32",
    ),
    (
        {"query_tags": torch.ones(2, 2, 5).long(), "key_tags": torch.ones(1, 2, 7).long()},
        ValueError,
        r"key_tags: expected shape \(2, 2, 7\), got \(1, 2, 7\)",
    ),
    ({"key_features": torch.ones(2, 7)}, ValueError, r"key_features: expected shape \(2, 7, any\), got \(2, 7\)"),
    ({"impl": "fast"}, ValueError, "impl: expected one of reference, cpu, triton, cuda or auto, got 'fast'"),
    ({"impl": None}, TypeError, "impl: expected a name, got NoneType"),
]


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_a_bad_call_names_the_argument(impl: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = good() | {"impl": impl} | change
    with pytest.raises(error, match=message):
        attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)


BAD_SPECS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"entropy": 1}, TypeError, r"StatSpec.entropy: expected a bool, got int \(1\)"),
    ({"sink": -1}, ValueError, "StatSpec.sink: expected an int from 0 to"),
    ({"sink": True}, TypeError, "StatSpec.sink: expected an int, got bool"),
    ({"diagonal": -1}, ValueError, "StatSpec.diagonal"),
    ({"topk": 65}, ValueError, "StatSpec.topk: expected an int from 0 to 64, got 65"),
    ({"topk": 2.0}, TypeError, "StatSpec.topk: expected an int, got float"),
    ({"offsets": -1}, TypeError, "StatSpec.offsets: expected a tuple of ints, got int"),
    ({"offsets": ("a",)}, TypeError, "StatSpec.offsets: expected an int, got str"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD_SPECS)
def test_a_bad_spec_names_the_field(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StatSpec(**fields)


def test_a_spec_takes_numpy_numbers_and_lists() -> None:
    spec = StatSpec(topk=np.int64(3), offsets=[-1, np.int32(1)], entropy=np.bool_(False))  # type: ignore[arg-type]
    assert spec == StatSpec(topk=3, offsets=(-1, 1), entropy=False)


def packed(**change: Any) -> None:
    arguments: dict[str, Any] = {
        "query": torch.randn(5, 4, 8),
        "key": torch.randn(7, 2, 8),
        "value": torch.randn(7, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 2, 5]),
        "cu_seqlens_k": torch.tensor([0, 3, 7]),
    } | change
    attention_varlen(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.randn(1, 4, 5, 8)}, ValueError, r"query: expected 3 dimensions \(total rows"),
        ({"cu_seqlens_q": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens_q: expected int32 or int64"),
        ({"cu_seqlens_q": torch.tensor([1, 5])}, ValueError, r"cu_seqlens_q: expected rising.*\[1, 5\]"),
        ({"cu_seqlens_q": torch.tensor([0, 4, 3, 5])}, ValueError, "cu_seqlens_q: expected rising values"),
        ({"cu_seqlens_k": torch.tensor([0, 3])}, ValueError, "cu_seqlens_k: expected rising values from 0 to 7"),
        (
            {"cu_seqlens_k": torch.tensor([0, 3, 5, 7])},
            ValueError,
            "cu_seqlens_k: expected 3 entries as in",
        ),
        ({"cu_seqlens_k": torch.tensor([[0, 7]])}, ValueError, r"cu_seqlens_k: expected shape \(sequences \+ 1,\)"),
        ({"query_mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"query_mask: expected shape \(5\), got \(4,\)"),
        ({"key_features": torch.ones(5, 1)}, ValueError, r"key_features: expected shape \(7, any\)"),
        (
            {"query_tags": torch.ones(1, 5).long(), "key_tags": torch.ones(1, 5).long()},
            ValueError,
            r"key_tags: expected shape \(1, 7\), got \(1, 5\)",
        ),
    ],
)
def test_a_bad_packed_call_names_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        packed(**change)


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_an_implementation_asked_for_by_name_never_falls_back(impl: str) -> None:
    with pytest.raises(NotImplementedError, match=f"impl='{impl}' cannot serve this call: "):
        attention(*torch.randn(3, 1, 1, 2, 4, dtype=torch.float64), impl=impl)


def test_the_cpu_kernel_refuses_other_devices() -> None:
    with pytest.raises(UnsupportedError, match="it serves tensors on the cpu, got meta"):
        attention(*torch.randn(3, 1, 1, 2, 4, device="meta"), impl="cpu")
