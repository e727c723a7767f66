"""Who is timed: attncap with rising statistics, and what else computes attention on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attncap
from attncap import StatSpec
from benchmarks import eager
from benchmarks.cases_cpu import Shape
from benchmarks.qualify import backwards
from benchmarks.qualify.place import Place

EVERYTHING = StatSpec.all()
SPECS = {
    "attncap, no statistics": StatSpec.none(),
    "attncap, few": StatSpec(topk=0, offsets=(-1,)),
    "attncap, few + top 8": StatSpec(offsets=(-1,)),
    "attncap, all but received": replace(EVERYTHING, received=False),
    "attncap, everything": EVERYTHING,
}
PLAIN, FEW, TOP8, _, ALL = SPECS
BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLEX, EAGER = "FlexAttention, lse and max", "eager + everything"
LONGEST_MAP = 4096


@dataclass(frozen=True)
class Contest:
    """One shape and who takes part."""

    shape: Shape
    flex: bool = False
    backward: bool = False

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        return self.shape.name + " backward" * self.backward

    @property
    def flops(self) -> float:
        return self.shape.flops * (backwards.FLOPS if self.backward else 1.0)

    @property
    def eager(self) -> bool:
        shape = self.shape
        return shape.rows is None and shape.key_heads is None and shape.keys <= LONGEST_MAP


def contests(place: Place) -> list[Contest]:
    """All of them; what follows a forward of the CUDA kernels is Triton's backward, and timed with Triton's."""
    return [contest for contest in _all_contests(place) if place.impl == "triton" or not contest.backward]


def _all_contests(place: Place) -> list[Contest]:
    """D 64, 128, 256, causal and full, three lengths; grouped heads; decoding; backwards of the longest."""
    if place.dry:
        shape = Shape(1, 1, 32, place.smallest_dim, causal=True, dtype="float16")
        return [Contest(shape), Contest(shape, backward=True)]
    squares = [
        Contest(Shape(1, 2048 // dim, keys, dim, causal=causal, dtype="bfloat16"), flex=keys == 16384)
        for dim in (64, 128, 256)
        for causal in (False, True)
        for keys in (2048, 4096, 16384)
    ]
    grouped = [Shape(1, 32, 8192, 128, key_heads=8, causal=True, dtype="bfloat16")]
    grouped.append(Shape(1, 16, 4096, 128, causal=True, dtype="float16"))
    decoding = [
        Shape(batch, 32, keys, 128, rows=1, key_heads=8, dtype="bfloat16")
        for batch, keys in ((1, 131072), (16, 8192))
    ]  # fmt: skip
    longest = [contest.shape for contest in squares if contest.shape.keys == 16384] + grouped[:1]
    trained = [Contest(shape, backward=True) for shape in longest if shape.dim <= 128]
    return squares + [Contest(shape) for shape in grouped + decoding] + trained


def contestants(place: Place, contest: Contest) -> dict[str, Callable[[], Any]]:
    """Calls by name, on tensors of their own."""
    shape = contest.shape
    if contest.backward:
        return backwards.contestants(place, shape, {"SDPA math": SDPBackend.MATH} if place.dry else BACKENDS)
    torch.manual_seed(0)
    make: dict[str, Any] = {"dtype": getattr(torch, shape.dtype), "device": place.device}
    query = torch.randn(shape.batch, shape.heads, shape.rows or shape.keys, shape.dim, **make)
    key, value = torch.randn(2, shape.batch, shape.key_heads or shape.heads, shape.keys, shape.dim, **make)
    grouped = shape.key_heads is not None

    def ours(spec: StatSpec, impl: str = place.impl) -> Any:
        return attncap.attention(query, key, value, spec, causal=shape.causal, impl=impl)

    def sdpa(*backends: SDPBackend) -> Any:
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(query, key, value, is_causal=shape.causal, enable_gqa=grouped)

    calls: dict[str, Callable[[], Any]] = {name: lambda spec=spec: ours(spec) for name, spec in SPECS.items()}
    if place.impl != "triton":
        calls |= {f"Triton's {name}": lambda spec=spec: ours(spec, "triton") for name, spec in SPECS.items()}
    if place.dry:
        calls["SDPA math"] = lambda: sdpa(SDPBackend.MATH)
    else:
        calls |= {name: lambda backend=backend: sdpa(backend) for name, backend in BACKENDS.items()}
    if contest.flex:
        calls[FLEX] = _flex(query, key, value, shape)
    if contest.eager:
        calls[EAGER] = lambda: eager.attention_with_statistics(query, key, value, EVERYTHING, causal=shape.causal)
    return calls


def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: Shape) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if shape.causal:
        mask = create_block_mask(
            lambda _b, _h, row, key: row >= key, None, None, shape.keys, shape.keys, device=query.device
        )
    aux = AuxRequest(lse=True, max_scores=True)
    return lambda: compiled(query, key, value, block_mask=mask, return_aux=aux)
