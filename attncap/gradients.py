"""The definition of attncap's gradients: the formula that kernels of a backward follow, in torch, by blocks of rows.

Let dX be the loss's derivative by the output X, p_ij the probabilities and p_i0 that of the null outcome. All outputs
but lse and max_logit are functions of the probabilities; their derivatives by them are

    G_ij = dout_i . v_j + dfeature_mass_i . f_j + dsink_mass_i [j < sink] + ddiagonal_mass_i [|j - pos_i| <= diagonal]
         + sum_o doffset_mass_io [j = pos_i + o] + sum_t dtag_mass_it [tags match] + ddistance_i |j - pos_i|
         + 2 dcollision_i p_ij + dreceived_mass_j + sum_k dtopk_prob_ik [j = topk_index_ik] - dentropy_i log p_ij
    G_i0 = dnull_mass_i - dentropy_i log p_i0

and with Delta_i = sum_j p_ij G_ij + p_i0 G_i0 those by scores, sink logits and everything that these are made of

    dscore_ij = p_ij (G_ij - Delta_i + dlse_i) + dmax_logit_i [j is the first key with the largest score]
    dsink_logits_h = sum_i p_i0 (G_i0 - Delta_i + dlse_i)
    dbias_ij = dscore_ij, dcapped_ij = dscore_ij (1 - (capped_ij / softcap)^2)
    dq_i = scale sum_j dcapped_ij k_j     dk_j = scale sum_i dcapped_ij q_i
    dv_j = sum_i p_ij dout_i              df_j = sum_i,h p_ij dfeature_mass_i

p log p and its derivative are 0 where p is. Rows that see no key take no part. Rows that `query_mask` leaves out have
an output, so dout counts, and constant statistics: nothing else does. Delta_i is dout_i . out_i, plus sum_j p_ij
dreceived_mass_j, plus each other derivative but those by lse and max_logit times its statistic, twice for collision.

    B batch  H query heads  G key/value heads  Q query rows  K keys  D, E head dims of key and value
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from attncap import reference
from attncap.types import HeadStats
from attncap.validation import Call, Extras, Gradients, Span, Upstream

# Scores of one block of rows, all heads together: on a CPU they stay in its caches, elsewhere few blocks are better.
_LARGEST_MAP = {"cpu": 1 << 20}
_LARGEST_MAP_ELSEWHERE = 1 << 24


def attention(call: Call, out: Tensor, stats: HeadStats, upstream: Upstream, gradients: Gradients) -> None:
    """Fill `gradients` of a call, on any device, in memory that grows with N; equal bits each time.

    Args:
        call: that of the forward.
        out, stats: what the forward gave: lse of every row, also of those that `query_mask` leaves out, and at least
            the other statistics whose derivatives there are. `topk_index` alone is read here, for the probabilities
            are computed once more.
    """
    compute = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    wanted = {field.name: getattr(gradients, field.name) for field in fields(gradients)}
    # Sums over blocks and heads are taken in the precision of the scores.
    sums = Gradients(
        **{name: None if tensor is None else torch.zeros_like(tensor, dtype=compute) for name, tensor in wanted.items()}
    )
    with torch.autocast(call.query.device.type, enabled=False):  # a backward may be run inside one
        for block in _blocks(call, stats, upstream):
            _add(block, block.of_sums(sums))
    for name, tensor in wanted.items():
        if tensor is not None:
            tensor.copy_(getattr(sums, name))


@dataclass(frozen=True)
class _Block:
    """Some rows of one sequence: a call of their own, B being 1, and what comes down to them."""

    call: Call
    topk_index: Tensor | None
    upstream: Upstream
    batch: slice
    rows: slice
    keys: slice

    def of_sums(self, sums: Gradients) -> Gradients:
        """Views of the sums that the block's gradients are added to."""
        mask = sums.attn_mask
        if mask is not None:
            places = (self.batch, slice(None), self.rows, self.keys)
            mask = mask[
                tuple(place if size > 1 else slice(None) for place, size in zip(places, mask.shape, strict=True))
            ]
        return Gradients(
            query=None if sums.query is None else sums.query[self.batch, :, self.rows],
            key=None if sums.key is None else sums.key[self.batch, :, self.keys],
            value=None if sums.value is None else sums.value[self.batch, :, self.keys],
            attn_mask=mask,
            sink_logits=sums.sink_logits,
            key_features=None if sums.key_features is None else sums.key_features[self.batch, self.keys],
            level=None if sums.level is None else sums.level[self.batch, :, self.rows],
        )


def _blocks(call: Call, stats: HeadStats, upstream: Upstream) -> Iterator[_Block]:
    largest = _LARGEST_MAP.get(call.query.device.type, _LARGEST_MAP_ELSEWHERE)
    for batch, row0, rows, key0, keys, offset in call.sequences:
        step = max(1, largest // max(1, call.query.shape[1] * keys))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            yield _block(call, stats, upstream, (batch, row0 + first, count, key0, keys, offset + first))


def _block(call: Call, stats: HeadStats, upstream: Upstream, span: Span) -> _Block:
    first, row0, count, key0, keys_count, offset = span
    batch, rows, keys = slice(first, first + 1), slice(row0, row0 + count), slice(key0, key0 + keys_count)
    extras = call.extras
    by_key = {"received_mass": keys}
    parts = {
        field.name: None if tensor is None else tensor[batch, :, by_key.get(field.name, rows)]
        for field in fields(upstream)
        for tensor in [getattr(upstream, field.name)]
    }
    part = Call(
        query=call.query[batch, :, rows],
        key=call.key[batch, :, keys],
        value=call.value[batch, :, keys],
        spec=call.spec,
        options=replace(call.options, query_offset=offset),
        extras=Extras(
            attn_mask=None if extras.attn_mask is None else extras.attn_mask[batch, :, rows, keys],
            sink_logits=extras.sink_logits,
            query_mask=None if extras.query_mask is None else extras.query_mask[batch, rows],
            query_tags=None if extras.query_tags is None else extras.query_tags[:, batch, rows],
            key_tags=None if extras.key_tags is None else extras.key_tags[:, batch, keys],
            key_features=None if extras.key_features is None else extras.key_features[batch, keys],
        ),
        sequences=[(0, 0, count, 0, keys_count, offset)],
        packed=False,
    )
    topk_index = None if stats.topk_index is None else stats.topk_index[batch, :, rows]
    return _Block(part, topk_index, Upstream(**parts), batch, rows, keys)


def _add(block: _Block, sums: Gradients) -> None:
    """Add what a block's rows contribute."""
    call, options, extras = block.call, block.call.options, block.call.extras
    ahead_QK = reference.ahead_of_rows(call.query, call.key, options)
    capped_BHQK = reference.capped_scores(call.query, call.key, options)
    scores_BHQK, seen_BHQK = reference.seen_scores(capped_BHQK, ahead_QK, options, extras.attn_mask)
    softmax = reference.softmax_of(scores_BHQK, seen_BHQK, extras.sink_logits)
    upstream = _counting(block.upstream, softmax, extras.query_mask)
    prob_BHQK, heads, groups = softmax.prob, call.query.shape[1], call.key.shape[1]

    by_prob_BHQK = torch.where(seen_BHQK, _by_probability(block, upstream, softmax, ahead_QK), 0.0)
    by_null_BHQ = _by_null_mass(upstream, softmax)
    level_BHQ = (prob_BHQK * by_prob_BHQK).sum(-1)
    if softmax.null_mass is not None:
        level_BHQ = level_BHQ + softmax.null_mass * by_null_BHQ
    if upstream.lse is not None:
        level_BHQ = level_BHQ - upstream.lse
    if sums.level is not None:
        sums.level.add_(level_BHQ)

    dscore_BHQK = prob_BHQK * (by_prob_BHQK - level_BHQ[..., None])
    if upstream.max_logit is not None and scores_BHQK.shape[-1] > 0:
        first_BHQ1 = scores_BHQK.argmax(-1, keepdim=True)
        dscore_BHQK.scatter_add_(-1, first_BHQ1, upstream.max_logit[..., None])
    if sums.attn_mask is not None:
        sums.attn_mask.add_(dscore_BHQK.sum_to_size(sums.attn_mask.shape))
    if sums.sink_logits is not None and softmax.null_mass is not None:
        sums.sink_logits.add_((softmax.null_mass * (by_null_BHQ - level_BHQ)).sum((0, 2)))

    if options.softcap:
        dscore_BHQK = dscore_BHQK * (1 - (capped_BHQK / options.softcap).square())
    dscore_BHQK = dscore_BHQK * options.scale
    compute = prob_BHQK.dtype
    if sums.query is not None:
        sums.query.add_(dscore_BHQK @ reference.repeat_heads(call.key, heads).to(compute))
    if sums.key is not None:
        sums.key.add_(_sum_groups(dscore_BHQK.transpose(-1, -2) @ call.query.to(compute), groups))
    if sums.value is not None and upstream.out is not None:
        sums.value.add_(_sum_groups(prob_BHQK.transpose(-1, -2) @ upstream.out, groups))
    if sums.key_features is not None and upstream.feature_mass is not None:
        sums.key_features.add_((prob_BHQK.transpose(-1, -2) @ upstream.feature_mass).sum(1))


def _counting(upstream: Upstream, softmax: reference.Softmax, query_mask: Tensor | None) -> Upstream:
    """The derivatives in the precision of the scores, 0 for rows whose output or statistic is a constant."""
    sees_BHQ = softmax.sees
    counted_BHQ = sees_BHQ if query_mask is None else sees_BHQ & query_mask[:, None]
    kept = {}
    for field in fields(upstream):
        tensor = getattr(upstream, field.name)
        if tensor is None:
            continue
        kept[field.name] = tensor.to(softmax.prob.dtype)
        if field.name != "received_mass":
            rows_BHQ = sees_BHQ if field.name == "out" else counted_BHQ
            rows = rows_BHQ if tensor.dim() == 3 else rows_BHQ[..., None]
            kept[field.name] = torch.where(rows, kept[field.name], 0.0)
    return Upstream(**kept)


def _by_probability(block: _Block, upstream: Upstream, softmax: reference.Softmax, ahead_QK: Tensor) -> Tensor:
    """G (B, H, Q, K), whatever it is for keys that are not seen."""
    call, spec, extras, heads = block.call, block.call.spec, block.call.extras, block.call.query.shape[1]
    prob_BHQK = softmax.prob
    total_BHQK = torch.zeros_like(prob_BHQK)
    if upstream.out is not None:
        value_BHKE = reference.repeat_heads(call.value, heads).to(prob_BHQK.dtype)
        total_BHQK += upstream.out @ value_BHKE.transpose(-1, -2)
    if upstream.feature_mass is not None and extras.key_features is not None:
        features_B1KF = extras.key_features[:, None].to(prob_BHQK.dtype)
        total_BHQK += upstream.feature_mass @ features_B1KF.transpose(-1, -2)
    if upstream.sink_mass is not None:
        total_BHQK[..., : spec.sink] += upstream.sink_mass[..., None]
    if upstream.diagonal_mass is not None and spec.diagonal is not None:
        total_BHQK += upstream.diagonal_mass[..., None] * (ahead_QK.abs() <= spec.diagonal)
    if upstream.offset_mass is not None:
        for place, offset in enumerate(spec.offsets):
            total_BHQK += upstream.offset_mass[..., place, None] * (ahead_QK == offset)
    if upstream.tag_mass is not None and extras.query_tags is not None and extras.key_tags is not None:
        for place, tags in enumerate(zip(extras.query_tags, extras.key_tags, strict=True)):
            total_BHQK += upstream.tag_mass[..., place, None] * reference.matching(*tags)
    if upstream.distance is not None:
        total_BHQK += upstream.distance[..., None] * ahead_QK.abs()
    if upstream.collision is not None:
        total_BHQK += 2 * upstream.collision[..., None] * prob_BHQK
    if upstream.received_mass is not None:
        received_BHQK = upstream.received_mass[:, :, None]
        if extras.query_mask is not None:
            received_BHQK = torch.where(extras.query_mask[:, None, :, None], received_BHQK, 0.0)
        total_BHQK += received_BHQK
    if upstream.topk_prob is not None and block.topk_index is not None and prob_BHQK.shape[-1] > 0:
        held = block.topk_index >= 0
        chosen = torch.where(held, upstream.topk_prob, 0.0)
        total_BHQK.scatter_add_(-1, torch.where(held, block.topk_index, 0).long(), chosen)
    if upstream.entropy is not None:
        total_BHQK -= upstream.entropy[..., None] * softmax.log_prob
    return total_BHQK


def _by_null_mass(upstream: Upstream, softmax: reference.Softmax) -> Tensor:
    """G_i0 (B, H, Q)."""
    total_BHQ = torch.zeros_like(softmax.lse)
    if upstream.null_mass is not None:
        total_BHQ = total_BHQ + upstream.null_mass
    if upstream.entropy is not None and softmax.log_null is not None:
        total_BHQ = total_BHQ - upstream.entropy * softmax.log_null
    return total_BHQ


def _sum_groups(tensor_BHKD: Tensor, groups: int) -> Tensor:
    """(B, G, K, D): the sum over the query heads that share a key head."""
    batch, heads, keys, dim = tensor_BHKD.shape
    return tensor_BHKD.view(batch, groups, heads // groups, keys, dim).sum(2)
