"""One attention call of a plain module that a capture serves, by itself or inside a compiled graph.

T tags  F feature columns  B batch  H query heads  G key/value heads  Q query rows  K keys  D head dimension
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attncap.adapters import PREFILL, Sink
from attncap.annotations import Annotations
from attncap.api import attention


@dataclass(frozen=True)
class ServedCall:
    """An attention call in the form of `attncap.attention`, and what is known of its tokens."""

    name: str  # of the module, with the number of the call in it
    crosses: bool
    query: Tensor  # (B, H, Q, D)
    key: Tensor  # (B, G, K, D)
    value: Tensor  # (B, G, K, E)
    attn_mask: Tensor | None
    causal: bool
    scale: float | None
    query_mask: Tensor | None  # (B, Q) bool, False for padding
    key_mask: Tensor | None  # (B, K) bool, False for padding
    annotations: Annotations
    query_offset: int = 0
    window: tuple[int, int] | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None  # (H,)
    seen_keys: Tensor | None = None  # as `accumulate.counted_rows` takes them; None to count them in the mask
    phase: str = PREFILL


class Server(Protocol):
    """Who computes served calls and takes their statistics."""

    def serve(self, call: ServedCall) -> Tensor:
        """Out (B, H, Q, E), contiguous."""


# A graph names its server by number: operators take no other Python objects.
_servers: weakref.WeakValueDictionary[int, Server] = weakref.WeakValueDictionary()
_numbers = itertools.count()

torch.library.define(
    "attncap::served",
    "(int server, str name, bool crosses, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool causal, "
    "float? scale, Tensor? query_mask, Tensor? key_mask, str[] tag_names, Tensor? query_tags, Tensor? key_tags, "
    "str[] feature_names, Tensor? key_features, SymInt query_offset, float? softcap, Tensor? sink_logits, str phase) "
    "-> Tensor",
)


def number_of(server: Server) -> int:
    """A number by which compiled graphs find a server, as long as it is there."""
    number = next(_numbers)
    _servers[number] = server
    return number


def call_in_graph(number: int, call: ServedCall) -> Tensor:
    """Have a compiled graph serve a call whenever it runs: one operator, whose effect is that of `Server.serve`."""
    notes = call.annotations
    result: Tensor = torch.ops.attncap.served(
        number,
        call.name,
        call.crosses,
        call.query,
        call.key,
        call.value,
        call.attn_mask,
        call.causal,
        call.scale,
        call.query_mask,
        call.key_mask,
        list(notes.tag_names),
        notes.query_tags,
        notes.key_tags,
        list(notes.feature_names),
        notes.key_features,
        call.query_offset,
        call.softcap,
        call.sink_logits,
        call.phase,
    )
    return result


@torch.library.impl("attncap::served", "CompositeExplicitAutograd")
def _served(
    number: int,
    name: str,
    crosses: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    causal: bool,
    scale: float | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    tag_names: list[str],
    query_tags: Tensor | None,
    key_tags: Tensor | None,
    feature_names: list[str],
    key_features: Tensor | None,
    query_offset: int,
    softcap: float | None,
    sink_logits: Tensor | None,
    phase: str,
) -> Tensor:
    annotations = Annotations(tuple(tag_names), query_tags, key_tags, tuple(feature_names), key_features)
    call = ServedCall(
        name, crosses, query, key, value, attn_mask, causal, scale, query_mask, key_mask, annotations, query_offset,
        softcap=softcap, sink_logits=sink_logits, phase=phase,
    )  # fmt: skip
    return _servers[number].serve(call)


@torch.library.register_fake("attncap::served")  # type: ignore[untyped-decorator]
def _served_shape(
    _number: int, _name: str, _crosses: bool, query: Tensor, _key: Tensor, value: Tensor, *_: object
) -> Tensor:
    return value.new_empty(*query.shape[:3], value.shape[-1])


def computed(call: ServedCall, sink: Sink) -> tuple[Tensor, Callable[[str], None]]:
    """(out, what gives the statistics to the sink under a name) of a call."""
    notes = call.annotations
    out, stats = attention(
        call.query,
        call.key,
        call.value,
        sink.spec,
        attn_mask=call.attn_mask,
        causal=call.causal,
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
        query_offset=call.query_offset,
        query_mask=sink.counted(call.query_mask, call.query),
        query_tags=notes.query_tags,
        key_tags=notes.key_tags,
        key_features=notes.key_features,
    )
    seen = call.seen_keys
    if seen is None:
        seen = keys_seen(call.attn_mask, causal=call.causal, query=call.query, key=call.key)

    def record(name: str) -> None:
        sink.record(name, stats, notes, seen, call.key_mask, call.phase, width=call.value.shape[-1])
        sink.watch(name, call, out, stats)

    return out, record


def fitting(annotations: Annotations | None, name: str, query: Tensor, key: Tensor) -> Annotations:
    """Tags and features of the batch on the call's device.

    Raises:
        ValueError: they are for another number of sequences or tokens than the call has.
    """
    if annotations is None:
        return Annotations()
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    features = annotations.key_features
    for what, got, expected in (
        ("query tags", None if annotations.query_tags is None else tuple(annotations.query_tags.shape[1:]), rows),
        ("key tags", None if annotations.key_tags is None else tuple(annotations.key_tags.shape[1:]), keys),
        ("features", None if features is None else tuple(features.shape[:2]), keys),
    ):
        if got is not None and got != (batch, expected):
            raise ValueError(
                f"tags, features: {name} has {what} for {(batch, expected)} (batch, tokens), the functions gave {got}; "
                "they cannot follow a cache while decoding, and modules of other lengths can be left out with layers="
            )
    moved = (annotations.query_tags, annotations.key_tags, features)
    query_tags, key_tags, features = (None if tensor is None else tensor.to(query.device) for tensor in moved)
    return Annotations(annotations.tag_names, query_tags, key_tags, annotations.feature_names, features)


def keys_seen(attn_mask: Tensor | None, *, causal: bool, query: Tensor, key: Tensor) -> Tensor:
    """How many keys each row sees, broadcastable to (B, H, Q), int64."""
    rows, keys = query.shape[2], key.shape[2]
    ends = torch.arange(1, rows + 1, device=query.device).clamp_max(keys) if causal else None
    if attn_mask is None:
        return torch.full((1, 1, rows), keys, device=query.device) if ends is None else ends[None, None]
    # An additive mask may hold the smallest number, not -inf, where nothing is to be seen.
    seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min / 2
    seen = seen.expand(*seen.shape[:-1], keys)
    seen = seen.reshape((1,) * (4 - seen.dim()) + tuple(seen.shape))
    if ends is None:
        return seen.sum(-1)
    up_to = torch.nn.functional.pad(seen.cumsum(-1), (1, 0))  # (., ., 1 or Q, K + 1)
    if up_to.shape[2] == 1:
        return up_to[:, :, 0][..., ends]
    return up_to.gather(-1, ends[None, None, :, None].expand(*up_to.shape[:3], 1))[..., 0]


def tokens_of_mask(attn_mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """(B, K) bool, False for keys that no row and no head sees by a mask that depends on the key alone; else None."""
    if attn_mask is None or attn_mask.dim() != 4:
        return None
    same_for_all = all(attn_mask.shape[side] == 1 or attn_mask.stride(side) == 0 for side in (1, 2))
    if not same_for_all or attn_mask.shape[0] != batch or attn_mask.shape[3] != keys:
        return None
    seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min / 2
    return seen[:, 0, 0]
