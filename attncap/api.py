"""The attention functions: check the arguments once, choose an implementation, run it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attncap import dispatch, reference, validation
from attncap.types import HeadStats, StatSpec, UnsupportedError
from attncap.validation import Extras, Options


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: StatSpec = StatSpec(),  # noqa: B008 - frozen
    *,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    query_offset: int | None = None,
    query_mask: Tensor | None = None,
    query_tags: Tensor | None = None,
    key_tags: Tensor | None = None,
    key_features: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, HeadStats]:
    """Attention and the statistics of every head's distribution, in one pass and O(N) memory.

    With pos_i = i + query_offset, over the keys j that row i sees::

        s_ij = softcap(scale * <q_i, k_j>) + bias_ij     lse_i = log sum_j exp(s_ij) [+ exp(sink_logits_h)]
        p_ij = exp(s_ij - lse_i)                         out_i = sum_j p_ij v_j

    Args:
        query: (B, H, Q, D), float32, float64, bfloat16 or float16, any strides.
        key: (B, G, K, D) with H % G == 0; query head h reads key head h // (H // G).
        value: (B, G, K, E); E may differ from D.
        spec: which statistics to capture.
        attn_mask: broadcastable to (B, H, Q, K); bool (True = attend) or floating (added to the scores;
            -inf is the same as False). Read in place.
        causal: key j is seen when j <= pos_i.
        scale: factor of the scores; 1/sqrt(D) when None.
        window: (left, right): pos_i - left <= j <= pos_i + right; -1 = unlimited.
        softcap: scores become softcap * tanh(score / softcap).
        sink_logits: (H,), one more outcome per head without a value (GPT-OSS); gives ``null_mass``.
        query_offset: position of row 0; K - Q when None (bottom-right aligned, as when decoding with a cache).
        query_mask: (B, Q) bool; rows that are False do not count (padding): their statistics are those of a row
            that sees nothing and they give nothing to ``received_mass``. Their ``out`` is as usual.
        query_tags: (T, B, Q) integers, and
        key_tags: (T, B, K) integers: ``tag_mass`` sums p where they are equal; a negative key tag matches nothing.
        key_features: (B, K, F) floating: ``feature_mass`` = sum_j p_ij F_j.
        impl: "reference", "cpu" (tensors on the CPU), "triton" (float32, float16 or bfloat16 on a GPU, or anywhere with
            TRITON_INTERPRET=1; D and E up to 256), "cuda" (float16 or bfloat16 on a Hopper GPU; D and E both 64, 128 or
            256; no mask, tags or features) or "auto". One asked for by name serves the call or raises.

    Returns:
        out (B, H, Q, E) in the value's dtype, and HeadStats in float32 (float64 for float64 inputs): logarithms in
        nats, masses as probabilities, distances in tokens. A row that sees no key has out 0, lse and max_logit -inf,
        masses and entropy 0, top-k probability 0 and index -1.

    Raises:
        TypeError, ValueError: an argument is not what it should be; the message names it.
        UnsupportedError: the implementation asked for cannot serve the call (a NotImplementedError).

    A non-finite value or feature may reach rows that do not see it, as 0 * NaN does in PyTorch; non-finite
    queries, keys and mask entries reach only the rows and heads that see them. In a backward 0 * NaN may carry queries
    and keys, too, to others of their head.

    Differentiable once, in query, key, value, a floating attn_mask, sink_logits and key_features: ``out`` and every
    statistic, in memory that grows with N. ``max_logit`` and ``topk_prob`` are so at the keys that hold them (of equal
    largest scores the first), ``topk_index`` is not. The gradient of a broadcast mask has the mask's own shape.
    "reference" is differentiated by torch's autograd, any number of times and with the map in memory.
    """
    validation.check_spec(spec)
    validation.check_qkv(query, key, value)
    options = validation.check_options(
        causal=causal, scale=scale, window=window, softcap=softcap, query_offset=query_offset, head_dim=query.shape[-1]
    )
    extras = validation.check_extras(
        query,
        key,
        attn_mask=attn_mask,
        sink_logits=sink_logits,
        query_mask=query_mask,
        query_tags=query_tags,
        key_tags=key_tags,
        key_features=key_features,
    )
    chosen = dispatch.choose(impl, query, key, value, spec, extras)
    out, stats, _ = run(query, key, value, spec, options, extras, chosen)
    return out, stats


def run(
    query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, options: Options, extras: Extras, impl: str
) -> tuple[Tensor, HeadStats, Tensor]:
    """(out, statistics, lse of every row) of checked arguments; `query_mask` hides rows of the statistics' own lse."""
    if impl == "reference":
        out, stats = reference.attention(query, key, value, spec, options, extras)
        return out, stats, stats.lse
    from attncap import ops

    refuse_forward_mode(query, key, value, extras)
    out, stats = ops.attention(query, key, value, spec, options, extras, impl)
    lse = stats.lse
    if extras.query_mask is not None:
        stats.lse = torch.where(extras.query_mask[:, None], lse, -torch.inf)
    return out, stats, lse


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    spec: StatSpec = StatSpec(),  # noqa: B008 - frozen
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    query_offset: int | None = None,
    query_mask: Tensor | None = None,
    query_tags: Tensor | None = None,
    key_tags: Tensor | None = None,
    key_features: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, HeadStats]:
    """`attention` of several sequences packed one after another; no row sees another sequence.

    Args:
        query: (rows, H, D), key: (keys, G, D), value: (keys, G, E), the sequences one after another.
        cu_seqlens_q: (sequences + 1,) int32 or int64, or a list of ints, rising from 0 to rows; sequence b owns rows
            cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1. cu_seqlens_k: the same for keys. Under torch.compile a list
            keeps the graph whole, a tensor is read by the host and breaks it.
        query_offset: position of each sequence's first row; its own K - Q when None.
        query_mask: (rows,) bool. query_tags: (T, rows), key_tags: (T, keys). key_features: (keys, F).

    Returns:
        out (rows, H, E), and HeadStats whose (B, H, Q) is (H, rows); received_mass is (H, keys). Positions,
        ``topk_index`` and ``sink_mass`` count from each sequence's own first key.

    The other arguments, the units and the errors are those of `attention`.
    """
    validation.check_spec(spec)
    validation.check_qkv(query, key, value, packed=True)
    bounds = _bounds(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
    options = validation.check_options(
        causal=causal, scale=scale, window=window, softcap=softcap, query_offset=query_offset, head_dim=query.shape[-1]
    )
    # Checked as one batch of the packed rows: (rows, H, D) seen as (1, H, rows, D).
    extras = validation.check_packed_extras(
        query,
        key,
        sink_logits=sink_logits,
        query_mask=query_mask,
        query_tags=query_tags,
        key_tags=key_tags,
        key_features=key_features,
    )
    chosen = dispatch.choose(impl, query, key, value, spec, extras)
    return _run_packed(query, key, value, bounds, spec, options, extras, chosen)


def _bounds(
    cu_seqlens_q: Tensor | Sequence[int], cu_seqlens_k: Tensor | Sequence[int], rows: int, keys: int
) -> tuple[list[int], list[int]]:
    """Where the sequences' rows and keys begin and end."""
    bounds_q = validation.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, rows)
    bounds_k = validation.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, keys)
    if len(bounds_q) != len(bounds_k):
        raise ValueError(f"cu_seqlens_k: expected {len(bounds_q)} entries as in cu_seqlens_q, got {len(bounds_k)}")
    if len(bounds_q) == 1:  # no sequence at all: one empty sequence gives the empty tensors
        return [0, 0], [0, 0]
    return bounds_q, bounds_k


def _run_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[list[int], list[int]],
    spec: StatSpec,
    options: Options,
    extras: Extras,
    impl: str,
) -> tuple[Tensor, HeadStats]:
    """`run` of sequences one after another."""
    if impl == "reference":
        return reference.attention_varlen(query, key, value, *bounds, spec, options, extras)
    from attncap import ops

    refuse_forward_mode(query, key, value, extras)
    out, stats = ops.attention_varlen(query, key, value, *bounds, spec, options, extras, impl)
    if extras.query_mask is not None:
        stats.lse = torch.where(extras.query_mask, stats.lse, -torch.inf)
    return out, stats


def refuse_forward_mode(query: Tensor, key: Tensor, value: Tensor, extras: Extras) -> None:
    """A derivative that would silently be nothing is refused: that of forward mode (torch.func.jvp)."""
    if forward_ad._current_level < 0:
        return
    named = {"query": query, "key": key, "value": value, "attn_mask": extras.attn_mask}
    named |= {"sink_logits": extras.sink_logits, "key_features": extras.key_features}
    for name, tensor in named.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise UnsupportedError(f"{name}: carries a forward-mode tangent, which impl='reference' alone knows")
