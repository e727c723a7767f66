"""One attention call that a capture serves, and what is known of its tokens.

T tags  F feature columns  B batch  H query heads  G key/value heads  Q query rows  K keys  D head dimension
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attncap.adapters import PREFILL, Sink
from attncap.annotations import Annotations
from attncap.api import run
from attncap.dispatch import choose
from attncap.layers import is_backward_running
from attncap.types import StatSpec, UnsupportedError
from attncap.validation import Options, check_extras, check_options, check_qkv


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
    padded: bool = False  # `query_mask` tells padding, and not only which rows see nothing

    @property
    def told(self) -> frozenset[str]:
        """What is known of its tokens."""
        notes = self.annotations
        tags, features = notes.query_tags is not None, notes.key_features is not None
        known = {"padding": self.padded, "tags": tags, "features": features}
        return frozenset(what for what, is_known in known.items() if is_known)

    @property
    def options(self) -> Options:
        """The numbers of the call."""
        return check_options(
            causal=self.causal,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            query_offset=self.query_offset,
            head_dim=self.query.shape[-1],
        )


def computed(call: ServedCall, sink: Sink) -> tuple[Tensor, Tensor, Callable[[str], None]]:
    """(out, lse of every row, what gives the statistics to the sink under a name) of a call.

    Where activation checkpointing runs the call once more it has been counted; no statistics are made, unless torch's
    autograd knows of them.
    """
    counts, notes = not is_backward_running(), call.annotations
    once_more = not counts and not sink.differentiable
    extras = check_extras(
        call.query,
        call.key,
        attn_mask=call.attn_mask,
        sink_logits=call.sink_logits,
        query_mask=None if once_more else sink.counted(call.query_mask, call.query),
        query_tags=None if once_more else notes.query_tags,
        key_tags=None if once_more else notes.key_tags,
        key_features=None if once_more else notes.key_features,
    )
    check_qkv(call.query, call.key, call.value)
    spec = StatSpec.none() if once_more else sink.spec
    impl = choose("auto", call.query, call.key, call.value, spec, extras)
    out, stats, lse = run(call.query, call.key, call.value, spec, call.options, extras, impl)
    seen = call.seen_keys
    if seen is None:
        seen = keys_seen(call.attn_mask, causal=call.causal, query=call.query, key=call.key)

    def record(name: str) -> None:
        if counts:
            sink.record(name, stats, notes, seen, call.key_mask, call.phase, width=call.value.shape[-1])
            sink.watch(name, call, out, stats)

    return out, lse, record


def refusal_once_more(call: ServedCall, sink: Sink) -> str:
    """Why the gradient of a call that activation checkpointing computes once more may not be taken; "" if it may.

    That is done by reentrant checkpointing alone: the other kind takes what the call saves to the forward's own graph.

    Raises:
        UnsupportedError: not even what it saves would be that of the forward.
    """
    forgotten = sink.forgotten(call)
    if sink.differentiable and forgotten:
        raise UnsupportedError(
            f"differentiable: activation checkpointing runs {call.name} once more without its {forgotten}, which its "
            "statistics depend on"
        )
    if sink.differentiable:
        return (
            f"differentiable: under reentrant activation checkpointing the statistics of {call.name} have no gradient; "
            "set use_reentrant=False"
        )
    if sink.importance and "padding" in forgotten:
        return (
            f"importance: reentrant activation checkpointing runs {call.name} once more without its padding; set "
            "use_reentrant=False, or give the checkpointed function the padding mask"
        )
    return ""


def check_dropout(name: str, dropout: float, sink: Sink) -> None:
    """Refuse dropout inside attention where it is not taken."""
    if not dropout:
        return
    if not sink.takes_dropout:
        raise UnsupportedError(
            f"dropout: {name} has dropout {dropout} in training mode, and what is shown of its heads would not be what "
            "they give; call model.eval() first"
        )
    if torch.compiler.is_compiling():
        raise UnsupportedError(
            f"dropout: {name} has dropout {dropout}, which cannot be watched in a compiled graph; set it to 0, or "
            "capture the model itself, not compiled"
        )


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
