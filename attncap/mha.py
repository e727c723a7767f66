"""What `torch.nn.functional.multi_head_attention_forward` computes, around an attention function of one's own.

B batch  H heads  Q query rows  K keys  D head dimension  E embedding
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attncap.heads_call import HeadsCall
from attncap.types import UnsupportedError

_BLOCK = 256  # rows of a mask that are looked at together


@dataclass(frozen=True)
class Projections:
    """Weights and biases of the four linear maps."""

    weights: tuple[Tensor, Tensor, Tensor]  # of query, key and value
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    out_weight: Tensor
    out_bias: Tensor | None

    def inner(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value (N, B, E) for the heads."""
        return tuple(
            F.linear(one, weight, bias) for one, weight, bias in zip(tokens, self.weights, self.biases, strict=True)
        )

    def outer(self, out_BHQD: Tensor) -> Tensor:
        """(Q, B, E) of what the heads gave."""
        return F.linear(out_BHQD.permute(2, 0, 1, 3).flatten(2), self.out_weight, self.out_bias)


def multi_head_attention(
    attend: Callable[[HeadsCall], tuple[Tensor, Any]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Any, HeadsCall]:
    """`torch.nn.functional.multi_head_attention_forward` with its arguments, around `attend`.

    Args:
        attend: gives (out (B, H, Q, D), anything) of a `HeadsCall`.
        query: (Q, B, E) or (Q, E), key: (K, B, E) or (K, E), value: as key.
        key_padding_mask: (B, K) or (K,), True (or -inf) for keys to be ignored; a floating one is added to the scores.
        attn_mask: (Q, K) or (B * H, Q, K), True for what is not seen; a floating one is added to the scores.
        need_weights, is_causal: `attn_mask` is the causal one; as in torch that is believed without need_weights and
            `key_padding_mask`, and the mask is looked at with one of them. Weights are the caller's matter.

    Returns:
        (out as the query, what `attend` gave, the call it was given).

    Raises:
        TypeError, ValueError: an argument is not what it should be; the message names it.
        UnsupportedError: dropout in training mode.
    """
    if training and dropout_p:
        raise UnsupportedError(f"dropout: expected 0.0 in training mode, got {dropout_p}; call model.eval() first")
    _check_shapes(query, key, value, embed_dim_to_check, num_heads)
    crosses = not _same(query, key)
    batched = query.dim() == 3
    if not batched:
        query, key, value = query[:, None], key[:, None], value[:, None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    projections = _projections(
        separate if use_separate_proj_weight else in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias
    )
    query_QBE, key_KBE, value_KBE = projections.inner(query, key, value)
    call = HeadsCall(
        query=_heads(query_QBE, num_heads),
        key=_extended(key_KBE, num_heads, bias_k, static_k, zero=add_zero_attn),
        value=_extended(value_KBE, num_heads, bias_v, static_v, zero=add_zero_attn),
        crosses=crosses,
    )
    call = _masked(call, attn_mask, key_padding_mask, key.shape[0], is_causal=is_causal, trusting=not need_weights)
    out, extra = attend(call)
    out_QBE = projections.outer(out)
    return out_QBE if batched else out_QBE[:, 0], extra, call


def weights_of(call: HeadsCall, *, average: bool) -> Tensor:
    """The map p itself, for those who ask for it: (B, Q, K) averaged over the heads, or (B, H, Q, K).

    Rows that see no key are 0.
    """
    _, heads, rows, _ = call.query.shape
    keys = call.key.shape[2]
    mask = None if call.attn_mask is None else call.attn_mask.expand(call.query.shape[0], heads, rows, keys)
    maps = []
    for head in range(heads):
        scores = (call.query[:, head] @ call.key[:, head].transpose(-1, -2)) * call.query.shape[-1] ** -0.5
        if mask is not None:
            one = mask[:, head]
            scores = scores.masked_fill(~one, -torch.inf) if one.dtype == torch.bool else scores + one
        if call.causal:
            later = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        maps.append(torch.softmax(scores, dim=-1).masked_fill(empty, 0.0))
    if not average:
        return torch.stack(maps, dim=1)
    total = maps[0]
    for one in maps[1:]:
        total = total + one
    return total / heads


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise UnsupportedError(
                f"{name}: got a nested tensor, which attncap does not read; give a padded one with key_padding_mask"
            )
    if query.dim() not in (2, 3):
        raise ValueError(
            f"query: expected (rows, embedding) or (rows, batch, embedding), got shape {tuple(query.shape)}"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != query.dim():
            raise ValueError(f"{name}: expected {query.dim()} dimensions as the query has, got {tuple(tensor.shape)}")
        if tensor.dim() == 3 and tensor.shape[1] != query.shape[1]:
            raise ValueError(f"{name}: expected the query's batch size {query.shape[1]}, got {tuple(tensor.shape)}")
    if key.shape[0] != value.shape[0]:
        raise ValueError(f"value: expected the key's length {key.shape[0]}, got shape {tuple(value.shape)}")
    if query.shape[-1] != embed_dim or embed_dim % num_heads:
        raise ValueError(
            f"query: expected an embedding of {embed_dim}, which {num_heads} heads divide, got {tuple(query.shape)}"
        )


def _projections(
    weights: Tensor | tuple[Tensor | None, ...] | None, bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None
) -> Projections:
    query, key, value = weights.chunk(3) if isinstance(weights, Tensor) else weights or (None, None, None)
    if query is None or key is None or value is None:
        raise ValueError("in_proj_weight: expected it, or q_proj_weight, k_proj_weight and v_proj_weight; got None")
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return Projections((query, key, value), (biases[0], biases[1], biases[2]), out_weight, out_bias)


def _heads(tensor_NBE: Tensor, heads: int) -> Tensor:
    """(N, B, E) seen as (B, H, N, D)."""
    length, batch, embedding = tensor_NBE.shape
    return tensor_NBE.reshape(length, batch, heads, embedding // heads).permute(1, 2, 0, 3)


def _extended(tensor_KBE: Tensor, heads: int, bias: Tensor | None, static: Tensor | None, *, zero: bool) -> Tensor:
    """Keys or values (B, H, K, D): projected or `static` (B * H, K, D), with those that the module appends."""
    if bias is not None:
        tensor_KBE = torch.cat([tensor_KBE, bias.expand(1, tensor_KBE.shape[1], -1)])
    found = _heads(tensor_KBE, heads) if static is None else static.reshape(-1, heads, *static.shape[1:])
    return F.pad(found, (0, 0, 0, 1)) if zero else found


def _masked(
    call: HeadsCall,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    keys: int,
    *,
    is_causal: bool,
    trusting: bool,
) -> HeadsCall:
    """The call with torch's two masks as one of attncap's; `keys` is their number before any was appended."""
    batch, heads, rows, _ = call.query.shape
    added = call.key.shape[2] - keys
    if is_causal and attn_mask is None:
        raise ValueError("attn_mask: expected the causal mask together with is_causal=True, got None")
    if key_padding_mask is None and is_causal and trusting:
        return replace(call, causal=True)
    causal = False
    mask = None
    if attn_mask is not None:
        expected = (rows, keys) if attn_mask.dim() == 2 else (batch * heads, rows, keys)
        if tuple(attn_mask.shape) != expected:
            raise ValueError(f"attn_mask: expected shape {expected}, got {tuple(attn_mask.shape)}")
        if is_causal and not added and _is_causal(attn_mask):
            causal = True  # and nothing of size B x Q x K is made
        else:
            mask = _seen("attn_mask", attn_mask, added)
            mask = mask if mask.dim() == 2 else mask.reshape(batch, heads, rows, -1)
    if key_padding_mask is None:
        return replace(call, attn_mask=mask, causal=causal)
    if tuple(key_padding_mask.shape) != (batch, keys):
        raise ValueError(f"key_padding_mask: expected shape {(batch, keys)}, got {tuple(key_padding_mask.shape)}")
    padding = _seen("key_padding_mask", key_padding_mask, added)
    key_mask = padding if padding.dtype == torch.bool else padding != -torch.inf
    return replace(call, attn_mask=_both(mask, padding[:, None, None]), causal=causal, key_mask=key_mask)


def _seen(name: str, mask: Tensor, added: int) -> Tensor:
    """torch's mask in attncap's meaning, the appended keys being seen: bool True = attend, or floating."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: expected a bool or floating dtype, got {mask.dtype}")
    mask = ~mask if mask.dtype == torch.bool else mask
    return F.pad(mask, (0, added), value=mask.dtype == torch.bool) if added else mask


def _both(mask: Tensor | None, padding: Tensor) -> Tensor:
    """One mask of two, each bool (True = attend) or floating."""
    if mask is None:
        return padding
    if mask.dtype == torch.bool and padding.dtype == torch.bool:
        return mask & padding
    if mask.dtype == torch.bool:
        return torch.where(mask, padding, -torch.inf)
    return torch.where(padding, mask, -torch.inf) if padding.dtype == torch.bool else mask + padding


def _is_causal(attn_mask: Tensor) -> bool:
    """Whether a mask of torch's meaning hides exactly the later keys; looked at in blocks of rows."""
    if attn_mask.dim() != 2 or torch.compiler.is_compiling():
        return False
    rows = attn_mask.shape[0]
    for start in range(0, rows, _BLOCK):
        block = attn_mask[start : start + _BLOCK]
        later = torch.ones(block.shape, dtype=torch.bool, device=block.device).triu(start + 1)
        wanted = later if block.dtype == torch.bool else torch.zeros_like(block).masked_fill(later, -torch.inf)
        if not torch.equal(block, wanted):
            return False
    return True


def _same(query: Tensor, key: Tensor) -> bool:
    """Whether query and key are the same tokens."""
    if query is key:
        return True
    if query.shape != key.shape or torch.compiler.is_compiling():
        return False
    # Two views of one tensor, as a batch-first module makes them.
    return query.is_set_to(key) or (query.dtype == key.dtype and torch.equal(query, key))
