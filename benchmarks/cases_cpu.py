"""The calls that are timed on the CPU, and who is timed on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import attncap
from attncap import StatSpec
from benchmarks import eager

EVERYTHING = StatSpec.all()


@dataclass(frozen=True)
class Shape:
    """One call; rows = keys unless said."""

    batch: int
    heads: int
    keys: int
    dim: int
    rows: int | None = None
    key_heads: int | None = None
    causal: bool = False
    padded: bool = False  # sequences of an eighth of the keys to all of them, told by a mask of keys
    dtype: str = "float32"
    flex: bool = False  # whether FlexAttention takes part: it compiles for every shape

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        rows = "" if self.rows is None else f" Q {self.rows}"
        groups = "" if self.key_heads is None else f"/{self.key_heads}"
        sizes = f"B {self.batch} H {self.heads}{groups}{rows} N {self.keys} D {self.dim}"
        return f"{self.dtype} {sizes}{' causal' * self.causal}{' padded' * self.padded}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of the two products, half of them where causal."""
        rows = self.keys if self.rows is None else self.rows
        return 4.0 * self.batch * self.heads * rows * self.keys * self.dim * (0.5 if self.causal else 1.0)

    @property
    def key_value_bytes(self) -> float:
        """What one read of keys and values takes."""
        size = getattr(torch, self.dtype).itemsize
        return 2.0 * self.batch * (self.key_heads or self.heads) * self.keys * self.dim * size

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random queries, keys and values."""
        torch.manual_seed(0)
        dtype = getattr(torch, self.dtype)
        query = torch.randn(self.batch, self.heads, self.rows or self.keys, self.dim).to(dtype)
        key, value = torch.randn(2, self.batch, self.key_heads or self.heads, self.keys, self.dim).to(dtype)
        return query, key, value

    def mask(self) -> Tensor | None:
        """(B, 1, 1, N) bool, False for padding."""
        if not self.padded:
            return None
        lengths = torch.linspace(self.keys / 8, self.keys, self.batch).long()
        return (torch.arange(self.keys) < lengths[:, None])[:, None, None]


SHAPES = [
    Shape(1, 8, 2048, dim, causal=causal, dtype=dtype, flex=dim == 64)
    for dtype in ("float32", "bfloat16")
    for dim in (64, 128)
    for causal in (False, True)
]
SHAPES += [Shape(1, 2, 8192, 64), Shape(1, 2, 8192, 64, dtype="bfloat16")]
SHAPES += [Shape(1, 8, 2048, 32), Shape(1, 8, 2048, 32, dtype="bfloat16")]
SHAPES += [Shape(1, 8, 512, 64), Shape(1, 8, 512, 64, dtype="bfloat16")]
SHAPES += [Shape(8, 12, 512, 32), Shape(32, 12, 128, 32), Shape(8, 12, 512, 32, padded=True)]  # MiniLM
SHAPES += [Shape(1, 8, 2048, 64, dtype="float16"), Shape(1, 8, 2048, 64, dtype="float64")]
DECODING = [
    Shape(4, 8, 8192, 64, rows=1),
    Shape(4, 8, 8192, 64, rows=1, dtype="bfloat16"),
    Shape(1, 32, 8192, 128, rows=1, key_heads=8),
    Shape(1, 32, 8192, 128, rows=1, key_heads=8, dtype="bfloat16"),
]


def contestants(shape: Shape) -> dict[str, Callable[[], object]]:
    """Who takes turns on a shape."""
    query, key, value = shape.tensors()
    mask, grouped = shape.mask(), shape.key_heads is not None

    def with_statistics(spec: StatSpec) -> Callable[[], object]:
        return lambda: attncap.attention(query, key, value, spec, causal=shape.causal, attn_mask=mask)

    return {
        "torch SDPA": lambda: F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=shape.causal, enable_gqa=grouped
        ),
        "no statistics": with_statistics(StatSpec.none()),
        "default": with_statistics(StatSpec()),
        "everything": with_statistics(EVERYTHING),
    }


def slower_peers(shape: Shape) -> dict[str, Callable[[], object]]:
    """Peers that leave the machine in another state (maps of hundreds of MB), with attncap between them.

    torch compiles FlexAttention for CPUs in float32 and bfloat16; it gives neither logsumexp nor statistics there.
    """
    if shape.rows is not None or shape.padded or shape.keys > 2048:
        return {}
    query, key, value = shape.tensors()
    calls: dict[str, Callable[[], object]] = {
        "everything": lambda: attncap.attention(query, key, value, EVERYTHING, causal=shape.causal),
        "eager + everything": lambda: eager.attention_with_statistics(
            query, key, value, EVERYTHING, causal=shape.causal
        ),
    }
    if shape.flex:
        flex = torch.compile(flex_attention)
        mask = _causal_blocks(shape.keys) if shape.causal else None
        calls["FlexAttention"] = lambda: flex(query, key, value, block_mask=mask)
    return calls


def _causal_blocks(keys: int) -> BlockMask:
    return create_block_mask(lambda _b, _h, row, key: row >= key, None, None, keys, keys, device="cpu")
