"""Launcher of the C++ kernels for the CPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attncap import _C, threads
from attncap.native import described, problem_of
from attncap.types import HeadStats
from attncap.validation import Call, Gradients, Upstream

_INT32_MAX = 2**31 - 1


def attention(call: Call, out: Tensor, stats: HeadStats) -> None:
    """Fill `out` and `stats` of a call on the CPU.

    Args:
        out: (B, H, Q, E); stats: tensors of what the call asks for, received_mass being zero.
    """
    call = _with_32_bit_tags(call)
    _C.attention(_problem(call, out, stats))


def backward(call: Call, out: Tensor, stats: HeadStats, upstream: Upstream, gradients: Gradients) -> None:
    """Fill `gradients` of a call, as gradients.attention defines them; equal bits on any number of threads.

    Args:
        out, stats: what the forward gave: every row's lse, and each statistic that has a derivative in `upstream`.
    """
    compute = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    wanted = {name: tensor for name, tensor in vars(gradients).items() if tensor is not None}
    # Sums are taken in the precision of the scores and rounded once.
    sums = {name: _summable(tensor, compute) for name, tensor in wanted.items()}
    views = sums
    if "attn_mask" in sums:
        views = sums | {"attn_mask": sums["attn_mask"].expand(*call.query.shape[:3], call.key.shape[2])}
    call = _with_32_bit_tags(call)
    _C.backward(
        _problem(call, out, stats),
        described(_C, _C.Upstream(), vars(upstream)),
        described(_C, _C.Gradients(), views),
    )
    for name, tensor in wanted.items():
        if sums[name] is not tensor:
            tensor.copy_(sums[name])


def _problem(call: Call, out: Tensor, stats: HeadStats) -> _C.Problem:
    problem: _C.Problem = problem_of(_C, call, out, stats)
    problem.threads = threads.usable()
    return problem


def _summable(gradient: Tensor, compute: torch.dtype) -> Tensor:
    """The tensor of zeros itself, or one that kernels can add to in its place."""
    if gradient.dtype == compute and (gradient.dim() < 3 or gradient.stride(-1) == 1):
        return gradient
    return torch.zeros(gradient.shape, dtype=compute)


def _with_32_bit_tags(call: Call) -> Call:
    if call.extras.query_tags is None and call.extras.key_tags is None:
        return call
    query_tags, key_tags = _tags_as_int32(call.extras.query_tags, call.extras.key_tags)
    return replace(call, extras=replace(call.extras, query_tags=query_tags, key_tags=key_tags))


def _tags_as_int32(query_tags: Tensor | None, key_tags: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The kernel compares 32-bit tags; wider ones are renumbered, equality and the sign of key tags kept."""
    if query_tags is None or key_tags is None or query_tags.numel() == 0 or key_tags.numel() == 0:
        return query_tags if query_tags is None else query_tags.to(torch.int32), (
            key_tags if key_tags is None else key_tags.to(torch.int32)
        )
    bounds = [int(bound) for tags in (query_tags, key_tags) for bound in torch.aminmax(tags)]
    if max(bounds) > _INT32_MAX or min(bounds) < -_INT32_MAX:
        split = query_tags.numel()
        _, codes = torch.unique(torch.cat([query_tags.flatten(), key_tags.flatten()]), return_inverse=True)
        codes_k = torch.where(key_tags < 0, -1, codes[split:].view(key_tags.shape))
        return codes[:split].view(query_tags.shape).to(torch.int32), codes_k.to(torch.int32)
    return query_tags.to(torch.int32), key_tags.to(torch.int32)
