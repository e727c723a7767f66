"""Calls that the kernels must get right: each option, statistic and path, at sizes that fill tiles and at odd ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncap import StatSpec
from benchmarks.qualify.place import Place
from tests.cases import Case

Qkv = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a place: on a GPU as in use, in the interpreter a few small tiles."""

    batch: int
    rows: int
    long: int  # keys of long rows
    few: int  # rows where they are not what matters
    most_dim: int
    topk: int
    most_topk: int

    @classmethod
    def of(cls, place: Place) -> Sizes:
        return cls(1, 41, 151, 19, place.smallest_dim, 2, 3) if place.dry else cls(2, 1003, 20011, 130, 256, 8, 64)

    @property
    def everything(self) -> StatSpec:
        return StatSpec.all(topk=self.topk)

    def tensors(self, heads: int, key_heads: int, rows: int, keys: int, dim: int, value_dim: int = 0) -> Qkv:
        """Random query, key and value."""
        dim, value_dim = (min(one, self.most_dim) for one in (dim, value_dim or dim))
        key, value = (torch.randn(self.batch, key_heads, keys, one) for one in (dim, value_dim))
        return torch.randn(self.batch, heads, rows, dim), key, value


def self_attention(dim: int, **options: Any) -> Callable[[Sizes], Case]:
    def build(sizes: Sizes) -> Case:
        return Case(*sizes.tensors(4, 2, sizes.rows, sizes.rows, dim), sizes.everything, options)

    return build


def odd_dims(sizes: Sizes) -> Case:
    return Case(*sizes.tensors(3, 1, sizes.few, sizes.rows, 80, 48), sizes.everything, {"causal": True, "softcap": 5.0})


def masked(sizes: Sizes, kind: str) -> Case:
    """One entry for each head and pair; some rows see nothing."""
    seen = torch.rand(1, 4, sizes.few, sizes.rows) < 0.6
    seen[:, :, 3] = False
    mask = seen if kind == "bool" else torch.randn(seen.shape).masked_fill(~seen, -torch.inf)
    return Case(*sizes.tensors(4, 2, sizes.few, sizes.rows, 64), sizes.everything, {"attn_mask": mask})


def annotated(sizes: Sizes) -> Case:
    """More tags and features than a program holds at once, sinks, and rows that do not count."""
    rows = sizes.few
    kwargs = {
        "causal": True,
        "query_tags": torch.randint(0, 4, (5, sizes.batch, rows)),
        "key_tags": torch.randint(-2, 4, (5, sizes.batch, rows)),
        "key_features": torch.randn(sizes.batch, rows, 33),
        "sink_logits": torch.tensor([0.5, -torch.inf, 2.0, -1.0]),
        "query_mask": torch.rand(sizes.batch, rows) < 0.7,
    }
    return Case(*sizes.tensors(4, 2, rows, rows, 64), sizes.everything, kwargs)


def padded(sizes: Sizes) -> Case:
    """Sinks, and rows that do not count; heads last."""
    tensors = (heads_last(tensor) for tensor in sizes.tensors(4, 2, sizes.few, sizes.few, 64))
    counted = torch.rand(sizes.batch, sizes.few) < 0.7
    options = {"causal": True, "sink_logits": torch.tensor([0.5, -torch.inf, 2.0, -1.0]), "query_mask": counted}
    return Case(*tensors, sizes.everything, options)


def heads_last(tensor: Tensor) -> Tensor:
    """The same numbers as Transformers lays them."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def decoding(sizes: Sizes, rows: int, topk: int) -> Case:
    """Few rows on many keys, which are split over programs and merged."""
    return Case(*sizes.tensors(8, 2, rows, sizes.long, 128), StatSpec.all(topk=topk), {"causal": True})


def long_rows(sizes: Sizes, topk: int) -> Case:
    return Case(*sizes.tensors(2, 1, sizes.few, sizes.long, 64), StatSpec.all(topk=topk), {"causal": True})


def ties(sizes: Sizes, kind: str) -> Case:
    """Scores that defeat a bound: all equal, in equal blocks, or rising along the row."""
    query, key, value = sizes.tensors(2, 1, sizes.few, sizes.rows, 64)
    place = torch.arange(sizes.rows)
    level = {"equal": 0 * place + 1, "blocks": place // 32 % 2, "rising": place / 64}[kind]
    key = torch.ones_like(key) * level[:, None]
    spec = StatSpec.all(topk=2 * sizes.topk)
    return Case(torch.ones_like(query), key, value, spec, {"causal": True})


def strided(sizes: Sizes) -> Case:
    """Heads last, as Transformers passes them, and every other element."""
    query, key, value = sizes.tensors(4, 2, sizes.few, sizes.few, 64)
    wide = torch.full((*key.shape[:-1], 2 * key.shape[-1]), torch.nan)
    wide[..., ::2] = key
    return Case(heads_last(query), wide[..., ::2], value, sizes.everything, {"causal": True})


def nothing_seen(sizes: Sizes) -> Case:
    """Rows before the first key."""
    options = {"causal": True, "query_offset": -7}
    return Case(*sizes.tensors(2, 2, sizes.few, sizes.few, 64), sizes.everything, options)


def no_keys(sizes: Sizes) -> Case:
    return Case(*sizes.tensors(2, 2, sizes.few, 0, 64), sizes.everything, {})


SCENARIOS: dict[str, Callable[[Sizes], Case]] = {
    "D 16": self_attention(16),
    "D 64 causal": self_attention(64, causal=True),
    "D 128": self_attention(128),
    "D 128 causal": self_attention(128, causal=True),
    "D 256 causal": self_attention(256, causal=True),
    "D 80, value 48, softcap": odd_dims,
    "softcap": self_attention(128, causal=True, softcap=5.0),
    "sinks, query mask": padded,
    "window": self_attention(64, window=(100, 3)),
    "causal window, negative scale": self_attention(64, causal=True, window=(70, -1), scale=-0.1),
    "bool mask": lambda sizes: masked(sizes, "bool"),
    "float mask": lambda sizes: masked(sizes, "float"),
    "tags, features, sinks, query mask": annotated,
    "decoding 1 row": lambda sizes: decoding(sizes, 1, sizes.topk),
    "decoding 5 rows, top 64": lambda sizes: decoding(sizes, 5, sizes.most_topk),
    "long rows, top 8": lambda sizes: long_rows(sizes, sizes.topk),
    "long rows, top 64": lambda sizes: long_rows(sizes, sizes.most_topk),
    "equal scores": lambda sizes: ties(sizes, "equal"),
    "blocks of equal scores": lambda sizes: ties(sizes, "blocks"),
    "rising scores": lambda sizes: ties(sizes, "rising"),
    "strides": strided,
    "rows that see nothing": nothing_seen,
    "no keys": no_keys,
}


# What the CUDA kernels leave to others.
NOT_FOR_CUDA = (
    *("D 16", "D 80, value 48, softcap", "bool mask", "float mask", "tags, features, sinks, query mask", "strides"),
)


def names(place: Place) -> list[str]:
    """Of the calls that the kernels of a place serve."""
    return [name for name in SCENARIOS if place.impl != "cuda" or name not in NOT_FOR_CUDA]


def scenario(place: Place, name: str, dtype: torch.dtype, seed: int) -> Case:
    """The same arguments give the same call."""
    torch.manual_seed(seed)
    return SCENARIOS[name](Sizes.of(place)).as_dtype(dtype).to(place.device)
