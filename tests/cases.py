"""Random attention calls: odd sizes, every option, awkward strides, empty rows."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attncap import StatSpec


@dataclass
class Case:
    """One call: `attention(query, key, value, spec, **kwargs)`."""

    query: Tensor
    key: Tensor
    value: Tensor
    spec: StatSpec
    kwargs: dict[str, Any] = field(default_factory=dict)

    def as_dtype(self, dtype: torch.dtype) -> Case:
        """The same numbers with inputs in another dtype; masks and features keep theirs."""
        cast = (tensor.to(dtype) for tensor in (self.query, self.key, self.value))
        return Case(*cast, self.spec, self.kwargs)

    def to(self, device: str) -> Case:
        """The same call on another device, strides included."""
        move = lambda given: moved(given, device) if isinstance(given, Tensor) else given  # noqa: E731
        kwargs = {name: move(given) for name, given in self.kwargs.items()}
        return Case(*map(move, (self.query, self.key, self.value)), self.spec, kwargs)


def moved(tensor: Tensor, device: str) -> Tensor:
    """A tensor on `device` with the strides it has; `Tensor.to` closes gaps."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@dataclass(frozen=True)
class Sizes:
    """What random calls draw their sizes from."""

    batches: tuple[int, ...] = (1, 2, 3)
    groups: tuple[int, ...] = (1, 2, 3)  # key heads
    heads_of_group: tuple[int, ...] = (1, 2, 4)
    rows: tuple[int, ...] = (0, 1, 2, 17, 63, 64, 65)
    longest: int = 150
    dims: tuple[int, ...] = (1, 3, 8, 16, 33, 64)
    value_dims: tuple[int, ...] = (1, 5, 8, 16, 32, 70)
    tags: tuple[int, ...] = (1, 2, 3)
    features: tuple[int, ...] = (1, 3, 9)


# For interpreted kernels, whose time is that of their tiles: few heads and rows; head dims, tags and features as wide
# as they come.
SMALL = Sizes(
    batches=(1, 1, 2),
    groups=(1, 2),
    heads_of_group=(1, 2),
    rows=(0, 1, 2, 17, 32, 33),
    longest=50,
    dims=(1, 3, 16, 33, 80, 256),
    value_dims=(1, 5, 16, 70, 129, 256),
    tags=(1, 3, 6),
    features=(1, 9, 35),
)


CUDA_DIMS = (64, 128, 256)


def strided(tensor: Tensor, rng: random.Random) -> Tensor:
    """The same values behind strides that are not contiguous."""
    kind = rng.choice(["plain", "heads last", "every other", "reversed dims"])
    if kind == "heads last":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "every other":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if kind == "reversed dims":
        return tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    return tensor


def random_spec(rng: random.Random) -> StatSpec:
    flip = lambda: rng.random() < 0.5  # noqa: E731
    return StatSpec(
        entropy=flip(),
        max=flip(),
        sink=rng.choice([0, 1, 4, 1000]),
        diagonal=rng.choice([None, 0, 1, 7, 1000]),
        topk=rng.choice([0, 1, 3, 8, 64]),
        offsets=tuple(rng.randint(-5, 5) for _ in range(rng.choice([0, 1, 3]))),
        distance=flip(),
        collision=flip(),
        received=flip(),
    )


def random_mask(rng: random.Random, shape: tuple[int, int, int, int]) -> Tensor | None:
    """A bool or floating mask in one of the broadcast forms, some rows of it hiding everything."""
    kind = rng.choice([None, "bool", "float", "float with -inf"])
    if kind is None:
        return None
    sizes = [size if rng.random() < 0.6 else 1 for size in shape]
    sizes = sizes[rng.choice([0, 0, 0, 1, 2, 3]) :]
    allowed = torch.rand(sizes) < rng.choice([0.1, 0.7, 0.95])
    if kind == "bool":
        return allowed
    bias = torch.randn(sizes, dtype=rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return bias.masked_fill(~allowed, -torch.inf) if kind == "float with -inf" else bias


def random_case(
    seed: int, *, dtype: torch.dtype = torch.float32, sizes: Sizes = Sizes(), number_of_keys: int | None = None
) -> Case:
    """The same seed gives the same call."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, groups = rng.choice(sizes.batches), rng.choice(sizes.groups)
    heads = groups * rng.choice(sizes.heads_of_group)
    longest = sizes.longest
    rows = rng.choice([*sizes.rows, rng.randint(1, longest)])
    keys = rows if rng.random() < 0.4 else rng.choice([0, 1, 5, 64, rng.randint(1, longest), 4 * longest])
    keys = keys if number_of_keys is None else number_of_keys
    dim, value_dim = rng.choice(sizes.dims), rng.choice(sizes.value_dims)
    magnitude = rng.choice([0.3, 1.0, 4.0])
    query = strided(magnitude * torch.randn(batch, heads, rows, dim).to(dtype), rng)
    key = strided(torch.randn(batch, groups, keys, dim).to(dtype), rng)
    value = strided(torch.randn(batch, groups, keys, value_dim).to(dtype), rng)
    kwargs: dict[str, Any] = {
        "attn_mask": random_mask(rng, (batch, heads, rows, keys)),
        "causal": rng.random() < 0.4,
        "scale": rng.choice([None, None, 0.5, 0.0, -0.7]),
        "window": rng.choice([None, None, (3, 0), (10, 4), (-1, 2), (5, -1), (0, 0)]),
        "softcap": rng.choice([None, None, 1.5, 30.0]),
        "query_offset": rng.choice([None, None, 0, 5, -7, 400]),
    }
    if rng.random() < 0.3:
        sinks = torch.randn(heads)
        sinks[rng.randrange(heads)] = -torch.inf
        kwargs["sink_logits"] = sinks
    if rng.random() < 0.3:
        kwargs["query_mask"] = torch.rand(batch, rows) < 0.7
    if rng.random() < 0.4:
        kinds = rng.choice(sizes.tags)
        far = rng.choice([0, 2**40])  # tags wider than 32 bits too
        high = rng.choice([4, 60])
        query_tags = torch.randint(0, high, (kinds, batch, rows))
        key_tags = torch.randint(-high // 2, high, (kinds, batch, keys))
        kwargs |= {
            "query_tags": torch.where(query_tags > 0, query_tags + far, query_tags),
            "key_tags": torch.where(key_tags > 0, key_tags + far, key_tags),
        }
    if rng.random() < 0.3:
        kwargs["key_features"] = torch.randn(batch, keys, rng.choice(sizes.features))
    return Case(query, key, value, random_spec(rng), kwargs)


def cuda_case(seed: int, *, dtype: torch.dtype = torch.bfloat16, sizes: Sizes = Sizes()) -> Case:
    """A random call less what the CUDA kernels leave to others; heads first or last."""
    case = random_case(seed, dtype=dtype, sizes=replace(sizes, dims=CUDA_DIMS))
    tensors = [case.query.contiguous(), case.key.contiguous(), torch.randn(*case.key.shape).to(dtype)]
    if random.Random(seed).random() < 0.5:
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    lacking = ("attn_mask", "query_tags", "key_tags", "key_features")
    kwargs = {name: given for name, given in case.kwargs.items() if name not in lacking}
    return Case(*tensors, case.spec, kwargs)
