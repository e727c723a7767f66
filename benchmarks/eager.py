"""What people do today: attention with the whole map, and the same statistics computed from it."""

from __future__ import annotations

import torch
from torch import Tensor

from attncap import HeadStats, StatSpec


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(out, scores, map) with (B, H, Q, K) scores and map."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        rows, keys = scores.shape[-2:]
        seen = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
        scores = scores.masked_fill(~seen, -torch.inf)
    prob = torch.softmax(scores, dim=-1)
    return prob @ value, scores, prob


def attention_with_statistics(
    query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, *, causal: bool = False
) -> tuple[Tensor, HeadStats]:
    """The statistics of `spec` from the map, each by the plainest torch expression."""
    out, scores, prob = attention(query, key, value, causal=causal)
    stats = HeadStats(lse=torch.logsumexp(scores, dim=-1))
    rows, keys = prob.shape[-2:]
    position = torch.arange(keys - rows, keys, device=query.device)
    ahead = torch.arange(keys, device=query.device) - position[:, None]
    if spec.max:
        stats.max_logit = scores.amax(-1)
    if spec.entropy:
        stats.entropy = -torch.xlogy(prob, prob).sum(-1)
    if spec.collision:
        stats.collision = prob.square().sum(-1)
    if spec.sink:
        stats.sink_mass = prob[..., : spec.sink].sum(-1)
    if spec.diagonal is not None:
        stats.diagonal_mass = (prob * (ahead.abs() <= spec.diagonal)).sum(-1)
    if spec.distance:
        stats.distance = (prob * ahead.abs()).sum(-1)
    if spec.offsets:
        stats.offset_mass = torch.stack([(prob * (ahead == offset)).sum(-1) for offset in spec.offsets], dim=-1)
    if spec.topk:
        stats.topk_prob, index = prob.topk(spec.topk, dim=-1)
        stats.topk_index = index.to(torch.int32)
    if spec.received:
        stats.received_mass = prob.sum(-2)
    return out, stats
