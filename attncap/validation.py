"""Checks at the border: every public attention call passes here once, whichever implementation serves it.

TypeError for a wrong kind of thing, ValueError for a wrong shape, range or device. Every message
names the argument, what was expected and what came.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attncap.types import MAX_POSITION, StatSpec

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float32).max
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Options:
    """The numbers of a call, all given their meaning (no None but query_offset's)."""

    causal: bool
    scale: float
    window: tuple[int, int]  # (left, right), -1 = unlimited
    softcap: float  # 0 = none
    query_offset: int | None  # None = K - Q of each sequence


@dataclass(frozen=True)
class Extras:
    """The optional tensors of a call."""

    attn_mask: Tensor | None = None  # four dimensions that broadcast to (B, H, Q, K)
    sink_logits: Tensor | None = None  # (H,)
    query_mask: Tensor | None = None  # (B, Q) bool
    query_tags: Tensor | None = None  # (T, B, Q) int64
    key_tags: Tensor | None = None  # (T, B, K) int64
    key_features: Tensor | None = None  # (B, K, F) floating


# Of one sequence: (batch, first row, rows, first key, keys, query offset).
Span = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Call:
    """One checked call as launchers take it, its tensors seen as (B, H, N, .) whether sequences are packed or not.

    The mask is seen through an expanded view: (B, H, Q, K), stride 0 where it is broadcast.
    """

    query: Tensor  # (B, H, Q, D), any strides; packed sequences as one batch entry
    key: Tensor  # (B, G, K, D)
    value: Tensor  # (B, G, K, E)
    spec: StatSpec
    options: Options
    extras: Extras
    sequences: list[Span]  # one for each batch entry where they are not packed
    packed: bool


@dataclass(frozen=True)
class Upstream:
    """What the backward of a call is given: the loss's derivative by each of its outputs, None where it is zero.

    Tensors as (B, H, N, .) like those of the call, any strides, 0 too. What stands in them for rows that see no key
    counts as zero, and so does what stands for the statistics of rows that `query_mask` leaves out.
    """

    out: Tensor | None = None  # (B, H, Q, E) in the value's dtype; the others float32, float64 for float64 inputs
    lse: Tensor | None = None  # (B, H, Q)
    max_logit: Tensor | None = None  # (B, H, Q)
    entropy: Tensor | None = None  # (B, H, Q)
    collision: Tensor | None = None  # (B, H, Q)
    sink_mass: Tensor | None = None  # (B, H, Q)
    diagonal_mass: Tensor | None = None  # (B, H, Q)
    distance: Tensor | None = None  # (B, H, Q)
    null_mass: Tensor | None = None  # (B, H, Q)
    offset_mass: Tensor | None = None  # (B, H, Q, O)
    tag_mass: Tensor | None = None  # (B, H, Q, T)
    feature_mass: Tensor | None = None  # (B, H, Q, F)
    topk_prob: Tensor | None = None  # (B, H, Q, k)
    received_mass: Tensor | None = None  # (B, H, K)


@dataclass(frozen=True)
class Gradients:
    """What a backward fills: tensors of zeros for the inputs whose gradients are wanted, None for the others.

    Seen as the call's inputs are, in their dtypes: packed sequences as one batch entry.
    """

    query: Tensor | None = None  # (B, H, Q, D)
    key: Tensor | None = None  # (B, G, K, D)
    value: Tensor | None = None  # (B, G, K, E)
    attn_mask: Tensor | None = None  # four dimensions, 1 where the mask is broadcast to (B, H, Q, K)
    sink_logits: Tensor | None = None  # (H,)
    key_features: Tensor | None = None  # (B, K, F)
    level: Tensor | None = None  # (B, H, Q) no gradient: Delta, see gradients.py, less what is by lse


def check_options(*, causal: Any, scale: Any, window: Any, softcap: Any, query_offset: Any, head_dim: int) -> Options:
    """Normalise the scalar arguments of a call."""
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal: expected a bool, got {type(causal).__name__} ({causal!r})")
    return Options(
        causal=bool(causal),
        scale=1.0 / math.sqrt(head_dim) if scale is None else _finite("scale", scale),
        window=_window(window),
        softcap=_softcap(softcap),
        query_offset=None if query_offset is None else _position("query_offset", query_offset, "an int or None"),
    )


def check_spec(spec: Any) -> StatSpec:
    """`spec` must be a StatSpec."""
    if not isinstance(spec, StatSpec):
        raise TypeError(f"spec: expected a StatSpec, got {type(spec).__name__}")
    return spec


def check_qkv(query: Any, key: Any, value: Any, *, packed: bool = False) -> None:
    """Query, key and value agree in rank, dtype, device, heads and lengths."""
    letters = ("total rows", "heads", "head dim") if packed else ("batch", "heads", "length", "head dim")
    length, heads = (0, 1) if packed else (2, 1)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _dense(name, tensor)
        if tensor.dtype not in _FLOATING:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dim() != len(letters):
            expected = f"{len(letters)} dimensions ({', '.join(letters)})"
            raise ValueError(f"{name}: expected {expected}, got shape {_shape(tensor)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected the query's dtype {query.dtype}, got {tensor.dtype}")
        _same_device(name, tensor, query)
    for name, tensor in (("key", key), ("value", value)):
        if not packed and tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name}: expected the query's batch size {query.shape[0]}, got shape {_shape(tensor)}")
    if value.shape[heads] != key.shape[heads] or value.shape[length] != key.shape[length]:
        raise ValueError(f"value: expected the key's heads and length, key {_shape(key)}, got {_shape(value)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: expected the query's head dim {query.shape[-1]}, got shape {_shape(key)}")
    if query.shape[-1] == 0:
        raise ValueError(f"query: expected a head dim of at least 1, got shape {_shape(query)}")
    groups = key.shape[heads]
    if query.shape[heads] == 0 or groups == 0 or query.shape[heads] % groups != 0:
        raise ValueError(f"key: expected a number of heads that divides the query's {query.shape[heads]}, got {groups}")
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[length] > MAX_POSITION:
            raise ValueError(f"{name}: expected a length up to {MAX_POSITION}, got {tensor.shape[length]}")


def check_mask(attn_mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """A bool or floating mask broadcastable to (B, H, Q, K), seen with four dimensions (nothing is copied)."""
    if attn_mask is None:
        return None
    _dense("attn_mask", attn_mask)
    _same_device("attn_mask", attn_mask, query)
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in _FLOATING:
        raise TypeError(f"attn_mask: expected a bool or floating dtype, got {attn_mask.dtype}")
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    sizes = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if attn_mask.dim() > 4 or any(size not in (1, target) for size, target in zip(sizes, full, strict=True)):
        raise ValueError(f"attn_mask: expected a shape broadcastable to {full}, got {_shape(attn_mask)}")
    view: Tensor = attn_mask.view(sizes) if attn_mask.dim() < 4 else attn_mask
    return view


def check_extras(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Any = None,
    sink_logits: Any = None,
    query_mask: Any = None,
    query_tags: Any = None,
    key_tags: Any = None,
    key_features: Any = None,
) -> Extras:
    """The optional tensors against (B, H, Q, D) queries and (B, G, K, D) keys."""
    batch, heads, rows = query.shape[:3]
    keys = key.shape[2]
    if query_mask is not None:
        _tensor_of("query_mask", query_mask, (torch.bool,), (batch, rows), query)
    if sink_logits is not None:
        _tensor_of("sink_logits", sink_logits, _FLOATING, (heads,), query)
    if (query_tags is None) != (key_tags is None):
        given, missing = ("query_tags", "key_tags") if key_tags is None else ("key_tags", "query_tags")
        raise ValueError(f"{missing}: expected together with {given}, got None")
    if query_tags is not None:
        _tensor_of("query_tags", query_tags, _INTEGER, (None, batch, rows), query)
        _tensor_of("key_tags", key_tags, _INTEGER, (query_tags.shape[0], batch, keys), query)
        query_tags, key_tags = query_tags.to(torch.int64), key_tags.to(torch.int64)
    if key_features is not None:
        _tensor_of("key_features", key_features, _FLOATING, (batch, keys, None), query)
    mask = check_mask(attn_mask, query, key)
    return Extras(mask, sink_logits, query_mask, query_tags, key_tags, key_features)


def check_packed_extras(query: Tensor, key: Tensor, **extras: Any) -> Extras:
    """`check_extras` for packed (rows, H, D) queries: seen as one batch, with the user's shapes in the messages."""
    rows, keys = query.shape[0], key.shape[0]
    query_mask, features = extras["query_mask"], extras["key_features"]
    query_tags, key_tags = extras["query_tags"], extras["key_tags"]
    if query_mask is not None:
        _tensor_of("query_mask", query_mask, (torch.bool,), (rows,), query)
        extras["query_mask"] = query_mask[None]
    if features is not None:
        _tensor_of("key_features", features, _FLOATING, (keys, None), query)
        extras["key_features"] = features[None]
    if query_tags is not None and key_tags is not None:
        _tensor_of("query_tags", query_tags, _INTEGER, (None, rows), query)
        _tensor_of("key_tags", key_tags, _INTEGER, (query_tags.shape[0], keys), query)
        extras["query_tags"], extras["key_tags"] = query_tags[:, None], key_tags[:, None]
    return check_extras(query.transpose(0, 1)[None], key.transpose(0, 1)[None], **extras)


def check_cu_seqlens(name: str, cu_seqlens: Any, total: int) -> list[int]:
    """Cumulative sequence lengths, a tensor or a list: rising integers from 0 to the number of packed rows."""
    if isinstance(cu_seqlens, (list, tuple)):
        bounds = [_position(name, bound, "a 1-D integer tensor or a list of ints") for bound in cu_seqlens]
    else:
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"{name}: expected an integer tensor or a list of ints, got {type(cu_seqlens).__name__}")
        _dense(name, cu_seqlens)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1:
            raise ValueError(f"{name}: expected shape (sequences + 1,), got {_shape(cu_seqlens)}")
        if cu_seqlens.is_meta:
            raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")
        bounds = cu_seqlens.tolist()
    if not bounds:
        raise ValueError(f"{name}: expected shape (sequences + 1,), got no entry")
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"{name}: expected rising values from 0 to {total} (the packed rows), got {_brief(bounds)}")
    return bounds


def _dense(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one (attention_varlen takes packed sequences)")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def _same_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name}: expected the query's device {query.device}, got {tensor.device}")


def _tensor_of(
    name: str, tensor: Any, dtypes: Sequence[torch.dtype], shape: tuple[int | None, ...], query: Tensor
) -> None:
    _dense(name, tensor)
    _same_device(name, tensor, query)
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {names}, got {tensor.dtype}")
    fits = tensor.dim() == len(shape) and all(
        want is None or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join("any" if want is None else str(want) for want in shape) + ")"
        raise ValueError(f"{name}: expected shape {wanted}, got {_shape(tensor)}")


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number or None, got {type(value).__name__} ({value!r})")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -_LARGEST <= number <= _LARGEST:  # written so that torch.compile can follow it
        raise ValueError(f"{name}: expected a finite number within the range of float32, got {number}")
    return number


def _softcap(softcap: Any) -> float:
    if softcap is None:
        return 0.0
    number = _finite("softcap", softcap)
    if number < 0:
        raise ValueError(f"softcap: expected a positive number, or 0 or None for none, got {number}")
    return number


def _position(name: str, value: Any, expected: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, np.bool_, Tensor)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} ({value!r})")
    if abs(number) > MAX_POSITION:
        raise ValueError(f"{name}: expected an int within +-{MAX_POSITION}, got {number}")
    return number


def _window(window: Any) -> tuple[int, int]:
    if window is None:
        return (-1, -1)
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window: expected (left, right) or None, got {window!r}")
    if len(window) != 2:
        raise ValueError(f"window: expected (left, right), got {len(window)} entries: {window!r}")
    left, right = (_position("window", side, "two ints (-1 = unlimited)") for side in window)
    if left < -1 or right < -1:
        raise ValueError(f"window: expected sides of at least 0, or -1 for unlimited, got {tuple(window)}")
    return (left, right)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-2]}, {values[-1]}]"
