"""The definition of attncap: attention and its statistics with the whole map in memory.

Read from top to bottom, this file is the specification that every other implementation is tested
against. It is slow on purpose and works in float64 for float64 inputs, in float32 otherwise. Its derivatives are those
that torch's autograd finds, any number of them; gradients.py has the first by formula.

    B batch  H query heads  G key/value heads  Q query rows  K keys  D, E head dims of key and value
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attncap.types import HeadStats, StatSpec
from attncap.validation import Extras, Options


def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, options: Options, extras: Extras
) -> tuple[Tensor, HeadStats]:
    """out = softmax(scores) @ value over the seen keys, and the statistics of that softmax."""
    ahead_QK = ahead_of_rows(query, key, options)
    capped_BHQK = capped_scores(query, key, options)
    scores_BHQK, seen_BHQK = seen_scores(capped_BHQK, ahead_QK, options, extras.attn_mask)
    softmax = softmax_of(scores_BHQK, seen_BHQK, extras.sink_logits)
    lse_BHQ, prob_BHQK = softmax.lse, softmax.prob
    null_mass_BHQ, log_null_BHQ = softmax.null_mass, softmax.log_null

    value_BHKE = repeat_heads(value, query.shape[1]).to(prob_BHQK.dtype)
    out = (prob_BHQK @ value_BHKE).to(value.dtype)

    # Rows that do not count have statistics of rows that see nothing.
    if extras.query_mask is not None:
        counted_BHQ = extras.query_mask[:, None, :].expand_as(lse_BHQ)
        seen_BHQK = seen_BHQK & counted_BHQ[..., None]
        scores_BHQK = scores_BHQK.masked_fill(~seen_BHQK, -torch.inf)
        prob_BHQK = prob_BHQK.masked_fill(~seen_BHQK, 0.0)
        lse_BHQ = lse_BHQ.masked_fill(~counted_BHQ, -torch.inf)
        if null_mass_BHQ is not None and log_null_BHQ is not None:
            null_mass_BHQ = null_mass_BHQ.masked_fill(~counted_BHQ, 0.0)
            log_null_BHQ = log_null_BHQ.masked_fill(~counted_BHQ, 0.0)

    stats = HeadStats(lse=lse_BHQ, null_mass=null_mass_BHQ)
    if spec.max:
        stats.max_logit = _max_over_keys(scores_BHQK)
    if spec.entropy:
        stats.entropy = torch.where(seen_BHQK, -prob_BHQK * softmax.log_prob, 0.0).sum(-1)
        if null_mass_BHQ is not None and log_null_BHQ is not None:
            stats.entropy = stats.entropy - null_mass_BHQ * log_null_BHQ
    if spec.collision:
        stats.collision = prob_BHQK.square().sum(-1)
    if spec.sink:
        stats.sink_mass = prob_BHQK[..., : spec.sink].sum(-1)
    if spec.diagonal is not None:
        stats.diagonal_mass = (prob_BHQK * (ahead_QK.abs() <= spec.diagonal)).sum(-1)
    if spec.distance:
        stats.distance = (prob_BHQK * ahead_QK.abs()).sum(-1)
    if spec.offsets:
        stats.offset_mass = torch.stack([(prob_BHQK * (ahead_QK == offset)).sum(-1) for offset in spec.offsets], -1)
    if spec.topk:
        stats.topk_prob, stats.topk_index = _topk(prob_BHQK, scores_BHQK, seen_BHQK, spec.topk)
    if spec.received:
        stats.received_mass = prob_BHQK.sum(-2)
    if extras.query_tags is not None and extras.key_tags is not None:
        stats.tag_mass = _tag_mass(prob_BHQK, extras.query_tags, extras.key_tags)
    if extras.key_features is not None:
        stats.feature_mass = prob_BHQK @ extras.key_features[:, None].to(prob_BHQK.dtype)
    return out, stats


def probabilities(query: Tensor, key: Tensor, options: Options, extras: Extras) -> tuple[Tensor, Tensor | None]:
    """(prob (B, H, Q, K), null_mass (B, H, Q) with sink_logits) of so few rows that their map may be made."""
    capped_BHQK = capped_scores(query, key, options)
    scores_BHQK, seen_BHQK = seen_scores(capped_BHQK, ahead_of_rows(query, key, options), options, extras.attn_mask)
    softmax = softmax_of(scores_BHQK, seen_BHQK, extras.sink_logits)
    return softmax.prob, softmax.null_mass


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: list[int],
    bounds_k: list[int],
    spec: StatSpec,
    options: Options,
    extras: Extras,
) -> tuple[Tensor, HeadStats]:
    """`attention` of each packed sequence by itself, put side by side: rows first in out, heads first in statistics."""
    outs, parts = [], []
    for q0, q1, k0, k1 in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True):
        out, stats = attention(
            query[q0:q1].transpose(0, 1)[None],
            key[k0:k1].transpose(0, 1)[None],
            value[k0:k1].transpose(0, 1)[None],
            spec,
            options,
            Extras(
                sink_logits=extras.sink_logits,
                query_mask=None if extras.query_mask is None else extras.query_mask[:, q0:q1],
                query_tags=None if extras.query_tags is None else extras.query_tags[:, :, q0:q1],
                key_tags=None if extras.key_tags is None else extras.key_tags[:, :, k0:k1],
                key_features=None if extras.key_features is None else extras.key_features[:, k0:k1],
            ),
        )
        outs.append(out[0].transpose(0, 1))
        parts.append(stats)
    joined = {
        field.name: torch.cat([getattr(part, field.name)[0] for part in parts], dim=1)
        for field in fields(HeadStats)
        if getattr(parts[0], field.name) is not None
    }
    return torch.cat(outs), HeadStats(**joined)


def ahead_of_rows(query: Tensor, key: Tensor, options: Options) -> Tensor:
    """(Q, K) int64: how far key j stands behind row i's position, j - pos_i."""
    rows, keys = query.shape[2], key.shape[2]
    offset = keys - rows if options.query_offset is None else options.query_offset
    position_Q = torch.arange(rows, device=query.device) + offset
    return torch.arange(keys, device=query.device) - position_Q[:, None]


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """(B, G, K, .) as (B, H, K, .): query head h reads key head h // (H // G)."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def capped_scores(query: Tensor, key: Tensor, options: Options) -> Tensor:
    """(B, H, Q, K): scale * <q_i, k_j>, capped where there is a softcap; before masks and biases."""
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    key_BHKD = repeat_heads(key, query.shape[1]).to(compute)
    scores_BHQK = options.scale * (query.to(compute) @ key_BHKD.transpose(-1, -2))
    return options.softcap * torch.tanh(scores_BHQK / options.softcap) if options.softcap else scores_BHQK


def seen_scores(
    capped_BHQK: Tensor, ahead_QK: Tensor, options: Options, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(scores with their bias, -inf for keys that are not seen; bool, which keys are seen)."""
    left, right = options.window
    seen_QK = torch.ones_like(ahead_QK, dtype=torch.bool)
    if options.causal:
        seen_QK = seen_QK & (ahead_QK <= 0)
    if left >= 0:
        seen_QK = seen_QK & (ahead_QK >= -left)
    if right >= 0:
        seen_QK = seen_QK & (ahead_QK <= right)
    seen_BHQK = seen_QK.expand(capped_BHQK.shape)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen_BHQK = seen_BHQK & attn_mask
    elif attn_mask is not None:
        bias_BHQK = attn_mask.to(capped_BHQK.dtype)
        # A bias of -inf is the same as a mask of False.
        seen_BHQK = seen_BHQK & (bias_BHQK != -torch.inf)
        capped_BHQK = capped_BHQK + bias_BHQK
    return capped_BHQK.masked_fill(~seen_BHQK, -torch.inf), seen_BHQK


@dataclass(frozen=True)
class Softmax:
    """The distribution of every row. A row that sees no key has lse -inf and all probabilities 0, the null's too.

    Logarithms of probabilities of 0 are 0, so that p log p and its derivative are 0 there.
    """

    sees: Tensor  # (B, H, Q) bool, whether the row sees any key
    lse: Tensor  # (B, H, Q)
    prob: Tensor  # (B, H, Q, K)
    log_prob: Tensor  # (B, H, Q, K)
    null_mass: Tensor | None  # (B, H, Q) with sink_logits
    log_null: Tensor | None  # (B, H, Q)


def softmax_of(scores_BHQK: Tensor, seen_BHQK: Tensor, sink_logits: Tensor | None) -> Softmax:
    """Everything is taken relative to the row's largest score, which keeps the digits of large scores."""
    sees_BHQ = seen_BHQK.any(-1)
    peak_BHQ = _max_over_keys(scores_BHQK).detach()
    if sink_logits is not None:
        sink_BHQ = sink_logits.to(scores_BHQK.dtype)[None, :, None].expand_as(peak_BHQ)
        peak_BHQ = torch.maximum(peak_BHQ, sink_BHQ.detach())
    peak_BHQ = torch.where(sees_BHQ, peak_BHQ, 0.0)
    relative_BHQK = torch.where(seen_BHQK, scores_BHQK - peak_BHQ[..., None], 0.0)
    mass_BHQ = torch.where(seen_BHQK, relative_BHQK.exp(), 0.0).sum(-1)
    if sink_logits is not None:
        held_BHQ = sees_BHQ & (sink_BHQ > -torch.inf)
        null_BHQ = torch.where(held_BHQ, sink_BHQ - peak_BHQ, 0.0)
        mass_BHQ = mass_BHQ + torch.where(held_BHQ, null_BHQ.exp(), 0.0)
    log_mass_BHQ = torch.where(sees_BHQ, mass_BHQ, 1.0).log()
    lse_BHQ = torch.where(sees_BHQ, peak_BHQ + log_mass_BHQ, -torch.inf)
    log_prob_BHQK = torch.where(seen_BHQK, relative_BHQK - log_mass_BHQ[..., None], 0.0)
    prob_BHQK = torch.where(seen_BHQK, log_prob_BHQK.exp(), 0.0)
    if sink_logits is None:
        return Softmax(sees_BHQ, lse_BHQ, prob_BHQK, log_prob_BHQK, None, None)
    log_null_BHQ = torch.where(held_BHQ, null_BHQ - log_mass_BHQ, 0.0)
    null_mass_BHQ = torch.where(held_BHQ, log_null_BHQ.exp(), 0.0)
    return Softmax(sees_BHQ, lse_BHQ, prob_BHQK, log_prob_BHQK, null_mass_BHQ, log_null_BHQ)


def _max_over_keys(scores_BHQK: Tensor) -> Tensor:
    if scores_BHQK.shape[-1] == 0:
        return scores_BHQK.new_full(scores_BHQK.shape[:-1], -torch.inf)
    # Of equal scores the first is the largest, in whose derivative alone the maximum's counts.
    return scores_BHQK.gather(-1, scores_BHQK.argmax(-1, keepdim=True))[..., 0]


def _topk(prob_BHQK: Tensor, scores_BHQK: Tensor, seen_BHQK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ordered by score, so that keys whose probability underflows keep their order; ties by rising index."""
    kept = min(k, scores_BHQK.shape[-1])
    # Unseen keys hold -inf and sort last; a stable sort puts the lower index first among equals.
    order = torch.argsort(scores_BHQK, dim=-1, descending=True, stable=True)[..., :kept]
    exists = seen_BHQK.gather(-1, order)
    prob = prob_BHQK.gather(-1, order).masked_fill(~exists, 0.0)
    index = order.masked_fill(~exists, -1).to(torch.int32)
    missing = (0, k - kept)
    return torch.nn.functional.pad(prob, missing), torch.nn.functional.pad(index, missing, value=-1)


def _tag_mass(prob_BHQK: Tensor, query_tags_TBQ: Tensor, key_tags_TBK: Tensor) -> Tensor:
    masses = [
        (prob_BHQK * matching(query_tag_BQ, key_tag_BK)).sum(-1)
        for query_tag_BQ, key_tag_BK in zip(query_tags_TBQ, key_tags_TBK, strict=True)
    ]
    return torch.stack(masses, dim=-1) if masses else prob_BHQK.new_zeros(*prob_BHQK.shape[:3], 0)


def matching(query_tag_BQ: Tensor, key_tag_BK: Tensor) -> Tensor:
    """(B, 1, Q, K) bool: keys with the row's tag; a negative key tag matches nothing."""
    match_BQK = (query_tag_BQ[:, :, None] == key_tag_BK[:, None, :]) & (key_tag_BK[:, None, :] >= 0)
    return match_BQK[:, None]
