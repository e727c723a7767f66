"""Gradients of random calls, and how close those of an implementation must be to float64's.

As in budget.py the allowance is what the plain form errs by itself in the same precision, a few times over, here that
of torch's autograd on the reference; and one rounding to the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncap import HeadStats, attention
from tests.budget import FACTOR, FLOOR, assert_within, difference, worst
from tests.cases import Case

DIFFERENTIABLE = ("attn_mask", "sink_logits", "key_features")
ROUNDING = {torch.float64: 0.0, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def inputs_of(case: Case) -> dict[str, Tensor]:
    """The inputs of a call that have gradients."""
    given = {"query": case.query, "key": case.key, "value": case.value}
    given |= {name: case.kwargs[name] for name in DIFFERENTIABLE if case.kwargs.get(name) is not None}
    return {name: tensor for name, tensor in given.items() if tensor.is_floating_point()}


def outputs_of(out: Tensor, stats: HeadStats) -> dict[str, Tensor]:
    """The outputs of a call that have derivatives, 0 where they are infinite."""
    outputs = {"out": out, **dict(stats.items())}
    outputs.pop("topk_index", None)
    return {name: torch.where(tensor.isfinite(), tensor, 0.0) for name, tensor in outputs.items()}


def loss_of(outputs: dict[str, Tensor], names: Collection[str] | None = None) -> Tensor:
    """A sum of all outputs, or of those named, each entry with a weight of its own that no dtype rounds."""
    total = torch.zeros((), dtype=torch.float64)
    for name, tensor in outputs.items():
        if names is None or name in names:
            weight = torch.randint(-16, 17, tensor.shape, generator=torch.Generator().manual_seed(len(name))) / 8
            total = total + (tensor.double() * weight.to(tensor.device)).sum()
    return total


def gradients_of(
    case: Case, impl: str, *, names: Collection[str] | None = None, dtype: torch.dtype | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Input -> gradient of `loss_of`; zeros where the loss does not depend on it.

    Args:
        dtype: compute in it, the same numbers.
    """
    leaves = {name: tensor.to(dtype or tensor.dtype).detach() for name, tensor in inputs_of(case).items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out, stats = attention(**{**case.kwargs, **leaves, "spec": case.spec, "impl": impl, **kwargs})
    loss = loss_of(outputs_of(out, stats), names)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if one is None else one for (name, leaf), one in pairs}


def assert_gradients_match_float64(
    case: Case, impl: str, *, names: Collection[str] | None = None, roundings: int = 0
) -> None:
    """The gradients of an implementation are those of the reference in float64, within the budget.

    Each gradient has one rounding to its dtype; kernels that multiply in the dtype of the call have more, of that one.
    """
    compute = torch.float64 if case.query.dtype == torch.float64 else torch.float32
    exact = gradients_of(case, "reference", names=names, dtype=torch.float64)
    plain = exact if compute == torch.float64 else gradients_of(case, "reference", names=names, dtype=compute)
    for name, found in gradients_of(case, impl, names=names).items():
        given, want = inputs_of(case)[name], exact[name]
        assert (found.shape, found.dtype) == (given.shape, given.dtype), f"{name}: {found.dtype} {tuple(found.shape)}"
        assert not found.isnan().any(), f"{name}: {int(found.isnan().sum())} of {found.numel()} are NaN"
        size = worst(want.abs())
        if name == "attn_mask" and found.numel() < _map_size(case):
            size = max(size, worst(_terms_of_mask(case, names)))
        allowed = FACTOR * worst(difference(plain[name], want)) + FLOOR[compute] * max(1.0, size)
        allowed += (ROUNDING[found.dtype] + roundings * ROUNDING[case.query.dtype]) * size
        assert_within(f"gradient of {name}", found, want, allowed)


def _map_size(case: Case) -> int:
    batch, heads, rows, _ = case.query.shape
    return batch * heads * rows * case.key.shape[2]


def _terms_of_mask(case: Case, names: Collection[str] | None) -> Tensor:
    """Of a mask that is broadcast, the absolute terms that its gradient is the sum of, added up: they may cancel."""
    mask = case.kwargs["attn_mask"]
    whole = mask.expand(*case.query.shape[:3], case.key.shape[2])
    expanded = replace(case, kwargs=case.kwargs | {"attn_mask": whole})
    terms = gradients_of(expanded, "reference", names=names, dtype=torch.float64)["attn_mask"].abs()
    return terms.sum_to_size(mask.shape)
