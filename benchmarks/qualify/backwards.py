"""Whose backward is timed: that of attncap's output, alone and with few statistics, and those of torch's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import attncap
from attncap import StatSpec
from benchmarks.cases_cpu import Shape
from benchmarks.qualify.place import Place

ALONE, WITH_FEW = "attncap, output alone", "attncap, output and few"
FLOPS = 2.5  # times those of a forward: five products and not two
FEW = StatSpec(topk=0, offsets=(-1,))


class Backward:
    """The gradients of query, key and value; the forward is made once, at the first call."""

    def __init__(self, leaves: list[Tensor], forward: Callable[..., list[Tensor]]) -> None:
        self.leaves, self.forward = leaves, forward
        self.outputs: list[Tensor] = []

    def __call__(self) -> tuple[Tensor, ...]:
        if not self.outputs:
            with torch.enable_grad():
                self.outputs = self.forward(*self.leaves)
            self.derivatives = [torch.randn_like(output) for output in self.outputs]
        return torch.autograd.grad(self.outputs, self.leaves, self.derivatives, retain_graph=True)


def contestants(place: Place, shape: Shape, backends: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Backwards by name, on tensors of their own."""
    torch.manual_seed(0)
    make: dict[str, Any] = {"dtype": getattr(torch, shape.dtype), "device": place.device, "requires_grad": True}
    groups, grouped = shape.key_heads or shape.heads, shape.key_heads is not None
    leaves = [torch.randn(shape.batch, heads, shape.keys, shape.dim, **make) for heads in (shape.heads, groups, groups)]

    def ours(spec: StatSpec) -> Callable[..., list[Tensor]]:
        def forward(*tensors: Tensor) -> list[Tensor]:
            out, stats = attncap.attention(*tensors, spec, causal=shape.causal, impl=place.impl)
            return [out] if spec == StatSpec.none() else [out, *(tensor for _, tensor in stats.items())]

        return forward

    def sdpa(backend: Any) -> Callable[..., list[Tensor]]:
        def forward(*tensors: Tensor) -> list[Tensor]:
            with sdpa_kernel([backend]):
                return [F.scaled_dot_product_attention(*tensors, is_causal=shape.causal, enable_gqa=grouped)]

        return forward

    forwards = {ALONE: ours(StatSpec.none()), WITH_FEW: ours(FEW)}
    forwards |= {name: sdpa(backend) for name, backend in backends.items()}
    return {name: Backward(leaves, forward) for name, forward in forwards.items()}
