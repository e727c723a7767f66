"""PyTorch's own signature: `scaled_dot_product_attention`, whose statistics go to the capture that is open."""

from __future__ import annotations

import math
import numbers
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from attncap.api import attention
from attncap.heads_call import Attend, HeadsCall
from attncap.types import StatSpec, UnsupportedError


class Recorder(Protocol):
    """Who serves the calls made while it is open, and takes their statistics."""

    @property
    def attend(self) -> Attend:
        """What serves it."""

    @property
    def is_running(self) -> bool:
        """Whether the next call of this thread is one of those it serves."""


# Of this thread; a plain attribute, which torch.compile can read and guard.
_open = threading.local()


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Offer every `scaled_dot_product_attention` call that this thread makes inside the block to `recorder`."""
    before: tuple[Recorder, ...] = getattr(_open, "recorders", ())
    _open.recorders = (recorder, *before)
    try:
        yield
    finally:
        _open.recorders = before


def attend_of_thread() -> Attend | None:
    """What serves this thread's next call: that of the innermost recorder it belongs to, if any."""
    recorders: tuple[Recorder, ...] = getattr(_open, "recorders", ())
    for recorder in recorders:
        if recorder.is_running:
            return recorder.attend
    return None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, same signature and meaning, captured.

    Args:
        query: (..., Q, D), key: (..., K, D), value: (..., K, E); leading dimensions broadcast, the last of
            them being the heads where there are at least two.
        attn_mask: broadcastable to (..., Q, K); bool (True = attend) or floating.
        dropout_p: must be 0: dropout is refused by name.
        is_causal: upper-left aligned (row i sees keys 0 .. i); not together with attn_mask.
        scale: factor of the scores; 1/sqrt(D) when None.
        enable_gqa: key and value may have fewer heads, which divide the query's.

    Returns:
        (..., Q, E) in the query's dtype.

    Raises:
        TypeError, ValueError: an argument is not what it should be; the message names it.
        UnsupportedError: dropout_p is not 0.
    """
    attend = attend_of_thread() or unrecorded
    return sdpa_by(attend, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def sdpa_by(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` around `attend`, which is given four dimensions."""
    _check_dropout(dropout_p)
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__} ({flag!r})")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: expected None together with is_causal=True, got a mask")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() < 2:
            got = tuple(tensor.shape)
            raise ValueError(f"{name}: expected at least 2 dimensions (..., length, head dim), got {got}")
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    if enable_gqa:
        key, value = _gqa_heads("key", key, query), _gqa_heads("value", value, query)
        if key.shape[-3] != value.shape[-3]:
            key, value = _repeat_heads(key, query.shape[-3]), _repeat_heads(value, query.shape[-3])

    lead = _broadcast_lead(query, key, value, grouped=enable_gqa)
    query4, key4, value4 = (_as_4d(tensor, lead, grouped=enable_gqa) for tensor in (query, key, value))
    mask4 = (
        None if attn_mask is None else _mask_as_4d(attn_mask, lead, query.shape[-2], key.shape[-2], grouped=enable_gqa)
    )
    out = attend(HeadsCall(query4, key4, value4, attn_mask=mask4, causal=is_causal, scale=scale))
    return out.reshape(*lead, query.shape[-2], value.shape[-1])


def unrecorded(call: HeadsCall) -> Tensor:
    """Out of a call whose statistics nobody wants."""
    out, _ = attention(
        call.query,
        call.key,
        call.value,
        StatSpec.none(),
        attn_mask=call.attn_mask,
        causal=call.causal,
        scale=call.scale,
        query_offset=0,
    )
    return out


def _check_dropout(dropout_p: float) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__} ({dropout_p!r})")
    if not 0.0 <= float(dropout_p) <= 1.0:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")
    if dropout_p:
        raise UnsupportedError(f"dropout_p: attncap has no dropout, expected 0.0, got {dropout_p}")


def _autocast(tensor: Tensor) -> Tensor:
    """As torch's autocast treats the arguments of its own function: float64 stays."""
    device = tensor.device.type
    # torch.compile cannot follow the question whether a device has an autocast at all; meta has none.
    if device not in ("cpu", "cuda", "xpu", "mps") or not torch.is_autocast_enabled(device):
        return tensor
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if eligible else tensor


def _gqa_heads(name: str, tensor: Tensor, query: Tensor) -> Tensor:
    if tensor.dim() < 3 or query.dim() < 3:
        got = tuple(tensor.shape)
        raise ValueError(f"{name}: enable_gqa expects a heads dimension (..., heads, length, head dim), got {got}")
    if tensor.shape[-3] == 0 or query.shape[-3] % tensor.shape[-3] != 0:
        raise ValueError(
            f"{name}: expected a number of heads that divides the query's {query.shape[-3]}, got {tensor.shape[-3]}"
        )
    return tensor


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[-3], dim=-3)


def _broadcast_lead(query: Tensor, key: Tensor, value: Tensor, *, grouped: bool) -> torch.Size:
    """The leading dimensions of the result: broadcast over the three, heads being the query's under GQA."""
    cut = -3 if grouped else -2
    try:
        lead: torch.Size = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
            query.shape[:cut], key.shape[:cut], value.shape[:cut]
        )
    except RuntimeError:
        raise ValueError(
            "key, value: expected leading dimensions that broadcast with the query's "
            f"{tuple(query.shape)}, got {tuple(key.shape)} and {tuple(value.shape)}"
        ) from None
    return torch.Size([*lead, query.shape[-3]]) if grouped else lead


def _split(lead: torch.Size, *, grouped: bool) -> tuple[int, int]:
    """(B, H) that the leading dimensions become; a single one is the heads under GQA and the batch otherwise."""
    if len(lead) == 1:
        return (1, lead[0]) if grouped else (lead[0], 1)
    return math.prod(lead[:-1]), lead[-1] if lead else 1


def _as_4d(tensor: Tensor, lead: torch.Size, *, grouped: bool) -> Tensor:
    """(..., N, D) broadcast to the common leading dimensions and seen as (B, H, N, D)."""
    full = torch.Size([*lead[:-1], tensor.shape[-3]]) if grouped else lead
    return tensor.expand(*full, *tensor.shape[-2:]).reshape(*_split(full, grouped=grouped), *tensor.shape[-2:])


def _mask_as_4d(attn_mask: Tensor, lead: torch.Size, rows: int, keys: int, *, grouped: bool) -> Tensor:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected a torch.Tensor, got {type(attn_mask).__name__}")
    full = (*lead, rows, keys)
    try:
        expanded = attn_mask.expand(full)
    except RuntimeError:
        raise ValueError(f"attn_mask: expected a shape broadcastable to {full}, got {tuple(attn_mask.shape)}") from None
    if attn_mask.dim() <= 2 or len(lead) == 2:  # broadcasts as it is
        return attn_mask
    return expanded.reshape(*_split(lead, grouped=grouped), rows, keys)
