"""`torch.nn.MultiheadAttention` with statistics in the place of the attention map.

B batch  H heads  Q query rows  K keys  E embedding
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attncap.api import attention
from attncap.heads_call import HeadsCall
from attncap.mha import multi_head_attention
from attncap.sdpa import attend_of_thread
from attncap.types import HeadStats, StatSpec
from attncap.validation import check_spec


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: same arguments, parameters and state dict, and no N x N map.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch has them. Dropout is refused in training mode.
        spec: which statistics `need_weights` gives.

    Appended keys (add_bias_kv, then add_zero_attn) are the last ones of the statistics.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        spec: StatSpec = StatSpec(),  # noqa: B008 - frozen
    ) -> None:
        if embed_dim > 0 and num_heads > 0 and embed_dim % num_heads:  # torch asserts
            raise ValueError(f"num_heads: expected a divisor of embed_dim, {embed_dim}, got {num_heads}")
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.spec = check_spec(spec)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, HeadStats | None]:
        """Multi-head attention, as torch computes it.

        Args:
            query: (Q, B, E), (B, Q, E) with batch_first, or (Q, E). key, value: the same with K.
            key_padding_mask: (B, K) or (K,), True for keys to be ignored; a floating one is added to the scores. Where
                query and key are the same tensor, padding rows do not count: their statistics are those of a row that
                sees nothing.
            need_weights: give statistics.
            attn_mask: (Q, K) or (B * H, Q, K), True for what is not seen; a floating one is added to the scores.
            average_attn_weights: has no meaning here, statistics are those of each head.
            is_causal: `attn_mask` is the causal one; as in torch it is looked at all the same with need_weights=True.

        Returns:
            (out as the query, HeadStats of (B, H, Q), or (H, Q) without a batch, or None). A row that sees no key has
            out 0 before the last projection, where torch gives NaN with need_weights=True.

        Raises:
            TypeError, ValueError: an argument is not what it should be; the message names it.
            UnsupportedError: dropout in training mode, nested tensors.
        """
        swaps = self.batch_first and query.dim() == 3
        if swaps:
            query, key, value = _swapped(query, key, value)

        def attend(call: HeadsCall) -> tuple[Tensor, HeadStats | None]:
            return _attend(call, self.spec if need_weights else None)

        out, stats, _ = multi_head_attention(
            attend,
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            is_causal=is_causal,
        )
        if stats is not None and query.dim() == 2:
            stats = HeadStats(**{name: tensor[0] for name, tensor in stats.items()})
        return out.transpose(0, 1) if swaps else out, stats


def _swapped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch and length swapped; what was one tensor stays one, which tells self-attention."""
    turned = query.transpose(0, 1)
    turned_key = turned if key is query else key.transpose(0, 1)
    turned_value = turned_key if value is key else value.transpose(0, 1)
    return turned, turned_key, turned_value


def _attend(call: HeadsCall, spec: StatSpec | None) -> tuple[Tensor, HeadStats | None]:
    """Serve the capture that is open, if any, and give the statistics asked for."""
    out = None
    recorder = attend_of_thread()
    if recorder is not None:
        out = recorder(call)
        if spec is None:
            return out, None
    query_mask = call.key_mask if not call.crosses and call.query.shape[2] == call.key.shape[2] else None
    own, stats = attention(
        call.query,
        call.key,
        call.value,
        StatSpec.none() if spec is None else spec,
        attn_mask=call.attn_mask,
        causal=call.causal,
        query_offset=0,
        query_mask=query_mask,
    )
    return own if out is None else out, stats if spec is not None else None
