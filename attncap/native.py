"""Describes a call to compiled kernels by pointers and strides, in the classes of csrc/bindings/problem.cpp.

Each module that is built of these kernels has those classes of its own, so the module is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from attncap.types import HeadStats
from attncap.validation import Call

Record = TypeVar("Record")

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.bool: "bool",
    torch.int32: "int32",
}


# Statistics whose switch has their name already.
_OUTPUT_FIELDS = {"entropy": "entropy_out", "collision": "collision_out", "distance": "distance_out"}


def problem_of(native: ModuleType, call: Call, out: Tensor, stats: HeadStats) -> Any:
    """A call with the tensors of its outputs, as a Problem of `native`; what it points at must outlive it."""
    query, key, value = call.query, call.key, call.value
    spec, options, extras = call.spec, call.options, call.extras
    problem = native.Problem()
    problem.heads, problem.key_heads = query.shape[1], key.shape[1]
    problem.key_dim, problem.value_dim = query.shape[3], value.shape[3]
    problem.sequences = [native.Sequence(*sequence) for sequence in call.sequences]
    problem.scale, problem.softcap, problem.causal = options.scale, options.softcap, options.causal
    problem.window_left, problem.window_right = options.window
    problem.entropy, problem.max, problem.distance = spec.entropy, spec.max, spec.distance
    problem.collision, problem.received = spec.collision, spec.received
    problem.sink, problem.topk, problem.offsets = spec.sink, spec.topk, list(spec.offsets)
    problem.diagonal = -1 if spec.diagonal is None else spec.diagonal

    problem.tags = 0 if extras.query_tags is None else extras.query_tags.shape[0]
    problem.features = 0 if extras.key_features is None else extras.key_features.shape[-1]
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": extras.attn_mask,
        "sink_logits": extras.sink_logits,
        "query_mask": extras.query_mask,
        "query_tags": extras.query_tags,
        "key_tags": extras.key_tags,
        "key_features": extras.key_features,
    }
    outputs = {"out": out} | {_OUTPUT_FIELDS.get(name, name): tensor for name, tensor in stats.items()}
    return described(native, problem, inputs | outputs)


def described(native: ModuleType, record: Record, tensors: Mapping[str, Tensor | None]) -> Record:
    """The record with the arrays of the tensors that are there and not empty."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() > 0:
            setattr(record, name, array_of(native, tensor))
    return record


def array_of(native: ModuleType, tensor: Tensor) -> Any:
    """A tensor as the kernels read it; it must outlive the call."""
    return native.Array(tensor.data_ptr(), _DTYPE_NAMES[tensor.dtype], tensor.stride())
