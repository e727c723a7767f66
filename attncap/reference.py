"""The definition of attncap: attention and its statistics with the whole map in memory.

Read from top to bottom, this file is the specification that every other implementation is tested
against. It is slow on purpose and works in float64 for float64 inputs, in float32 otherwise.

    B batch  H query heads  G key/value heads  Q query rows  K keys  D, E head dims of key and value
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from attncap.types import HeadStats, StatSpec
from attncap.validation import Extras, Options


def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, options: Options, extras: Extras
) -> tuple[Tensor, HeadStats]:
    """out = softmax(scores) @ value over the seen keys, and the statistics of that softmax."""
    position_Q, key_K = _positions(query, key, options)
    scores_BHQK = _scores(query, key, options, extras)
    seen_BHQK = _seen(scores_BHQK, position_Q, key_K, options, extras)
    scores_BHQK = scores_BHQK.masked_fill(~seen_BHQK, -torch.inf)

    lse_BHQ, log_prob_BHQK, null_mass_BHQ = _softmax(scores_BHQK, seen_BHQK, extras.sink_logits)
    prob_BHQK = torch.where(seen_BHQK, log_prob_BHQK.exp(), 0.0)

    value_BHKE = _repeat_heads(value, query.shape[1]).to(prob_BHQK.dtype)
    out = (prob_BHQK @ value_BHKE).to(value.dtype)

    # Rows that do not count have statistics of rows that see nothing.
    if extras.query_mask is not None:
        counted_BHQ = extras.query_mask[:, None, :].expand_as(lse_BHQ)
        seen_BHQK = seen_BHQK & counted_BHQ[..., None]
        scores_BHQK = scores_BHQK.masked_fill(~seen_BHQK, -torch.inf)
        prob_BHQK = prob_BHQK.masked_fill(~seen_BHQK, 0.0)
        lse_BHQ = lse_BHQ.masked_fill(~counted_BHQ, -torch.inf)
        null_mass_BHQ = None if null_mass_BHQ is None else null_mass_BHQ.masked_fill(~counted_BHQ, 0.0)

    stats = HeadStats(lse=lse_BHQ, null_mass=null_mass_BHQ)
    if spec.max:
        stats.max_logit = _max_over_keys(scores_BHQK)
    if spec.entropy:
        stats.entropy = torch.where(seen_BHQK, -prob_BHQK * log_prob_BHQK, 0.0).sum(-1)
        if null_mass_BHQ is not None:
            stats.entropy = stats.entropy - torch.xlogy(null_mass_BHQ, null_mass_BHQ)
    if spec.collision:
        stats.collision = prob_BHQK.square().sum(-1)
    if spec.sink:
        stats.sink_mass = prob_BHQK[..., : spec.sink].sum(-1)
    if spec.diagonal is not None:
        near_QK = (key_K - position_Q[:, None]).abs() <= spec.diagonal
        stats.diagonal_mass = (prob_BHQK * near_QK).sum(-1)
    if spec.distance:
        distance_QK = (key_K - position_Q[:, None]).abs().to(prob_BHQK.dtype)
        stats.distance = (prob_BHQK * distance_QK).sum(-1)
    if spec.offsets:
        stats.offset_mass = torch.stack(
            [(prob_BHQK * (key_K == position_Q[:, None] + offset)).sum(-1) for offset in spec.offsets], dim=-1
        )
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
    position_Q, key_K = _positions(query, key, options)
    scores_BHQK = _scores(query, key, options, extras)
    seen_BHQK = _seen(scores_BHQK, position_Q, key_K, options, extras)
    scores_BHQK = scores_BHQK.masked_fill(~seen_BHQK, -torch.inf)
    _, log_prob_BHQK, null_mass_BHQ = _softmax(scores_BHQK, seen_BHQK, extras.sink_logits)
    return torch.where(seen_BHQK, log_prob_BHQK.exp(), 0.0), null_mass_BHQ


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


def _positions(query: Tensor, key: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    rows, keys = query.shape[2], key.shape[2]
    offset = keys - rows if options.query_offset is None else options.query_offset
    return torch.arange(rows, device=query.device) + offset, torch.arange(keys, device=query.device)


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _scores(query: Tensor, key: Tensor, options: Options, extras: Extras) -> Tensor:
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    key_BHKD = _repeat_heads(key, query.shape[1]).to(compute)
    scores_BHQK = options.scale * (query.to(compute) @ key_BHKD.transpose(-1, -2))
    if options.softcap:
        scores_BHQK = options.softcap * torch.tanh(scores_BHQK / options.softcap)
    if extras.attn_mask is not None and extras.attn_mask.dtype != torch.bool:
        scores_BHQK = scores_BHQK + extras.attn_mask.to(compute)
    return scores_BHQK


def _seen(scores_BHQK: Tensor, position_Q: Tensor, key_K: Tensor, options: Options, extras: Extras) -> Tensor:
    ahead_QK = key_K - position_Q[:, None]
    left, right = options.window
    seen_QK = torch.ones_like(ahead_QK, dtype=torch.bool)
    if options.causal:
        seen_QK = seen_QK & (ahead_QK <= 0)
    if left >= 0:
        seen_QK = seen_QK & (ahead_QK >= -left)
    if right >= 0:
        seen_QK = seen_QK & (ahead_QK <= right)
    seen_BHQK = seen_QK.expand(scores_BHQK.shape)
    if extras.attn_mask is not None:
        # A bias of -inf is the same as a mask of False.
        bias_is_finite = extras.attn_mask.to(scores_BHQK.dtype) != -torch.inf
        seen_BHQK = seen_BHQK & (extras.attn_mask if extras.attn_mask.dtype == torch.bool else bias_is_finite)
    return seen_BHQK


def _softmax(
    scores_BHQK: Tensor, seen_BHQK: Tensor, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(lse, log of the probabilities, null_mass).

    Everything is taken relative to the row's largest score, which keeps the digits of large scores. A row that sees
    no key has lse -inf and null_mass 0, with sink_logits too.
    """
    sees_BHQ = seen_BHQK.any(-1)
    peak_BHQ = _max_over_keys(scores_BHQK)
    if sink_logits is not None:
        sink_BHQ = sink_logits.to(scores_BHQK.dtype)[None, :, None].expand_as(peak_BHQ)
        peak_BHQ = torch.maximum(peak_BHQ, sink_BHQ)
    peak_BHQ = torch.where(sees_BHQ, peak_BHQ, 0.0)
    relative_BHQK = torch.where(seen_BHQK, scores_BHQK - peak_BHQ[..., None], 0.0)
    mass_BHQ = torch.where(seen_BHQK, relative_BHQK.exp(), 0.0).sum(-1)
    if sink_logits is not None:
        mass_BHQ = mass_BHQ + (sink_BHQ - peak_BHQ).exp()
    log_mass_BHQ = mass_BHQ.log()
    log_prob_BHQK = torch.where(seen_BHQK, relative_BHQK - log_mass_BHQ[..., None], 0.0)
    lse_BHQ = torch.where(sees_BHQ, peak_BHQ + log_mass_BHQ, -torch.inf)
    if sink_logits is None:
        return lse_BHQ, log_prob_BHQK, None
    null_mass_BHQ = torch.where(sees_BHQ, (sink_BHQ - peak_BHQ).exp() / mass_BHQ, 0.0)
    return lse_BHQ, log_prob_BHQK, null_mass_BHQ


def _max_over_keys(scores_BHQK: Tensor) -> Tensor:
    if scores_BHQK.shape[-1] == 0:
        return scores_BHQK.new_full(scores_BHQK.shape[:-1], -torch.inf)
    return scores_BHQK.amax(-1)


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
    masses = []
    for query_tag_BQ, key_tag_BK in zip(query_tags_TBQ, key_tags_TBK, strict=True):
        # A negative key tag matches nothing.
        match_BQK = (query_tag_BQ[:, :, None] == key_tag_BK[:, None, :]) & (key_tag_BK[:, None, :] >= 0)
        masses.append((prob_BHQK * match_BQK[:, None]).sum(-1))
    return torch.stack(masses, dim=-1) if masses else prob_BHQK.new_zeros(*prob_BHQK.shape[:3], 0)
