"""How much of its layer's output a head makes, and why: large weights, large values where it looks, or agreement.

B sequences   N tokens   H heads   K keys   V head dim of the value   E embedding
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attncap.adapters.served import ServedCall
from attncap.analysis.batches import each, run
from attncap.analysis.blocks import AttentionBlock, attention_blocks, by_layer_and_head
from attncap.analysis.circuits import circuits
from attncap.api import attention
from attncap.capture import Capture
from attncap.layers import module_of
from attncap.types import HeadStats, StatSpec

WEIGHT, PLACE, CANCELLING = "small weight", "small values where it looks", "values cancel out"
REASONS = (WEIGHT, PLACE, CANCELLING)

SMALL_SHARE = 0.5
"""Of an even share of the layer's output, below which `OutputWeight.reason` says why; a choice of this project."""


@dataclass(frozen=True)
class OutputWeight:
    """(layers, heads) float64 each, NaN where a layer has fewer heads.

    Attributes:
        layers: names of the attention modules.
        weight: |W_O| (Frobenius), the static weight that the output gives the head.
        ov: |W_V W_O| (Frobenius).
        output: mean over tokens of |out_i W_O|, = value * place * agreement.
        share: `output` over its sum over the heads of the layer.
        value: mean over tokens of |v_j W_O|.
        place: mean over tokens of sum_j p_ij |v_j W_O|, over `value`: below 1 where attention lies on small values.
        agreement: `output` over mean of sum_j p_ij |v_j W_O|, at most 1: small where the values looked at cancel out.
        sink: share of all attention on the key of each sequence that receives most of it, mean over sequences.
        sink_value: |v_j W_O| of that key over the mean of its sequence, mean over sequences.
    """

    layers: tuple[str, ...]
    weight: Tensor
    ov: Tensor
    output: Tensor
    share: Tensor
    value: Tensor
    place: Tensor
    agreement: Tensor
    sink: Tensor
    sink_value: Tensor

    def reason(self, layer: int, head: int) -> str | None:
        """Why the head's share is below half an even one: of the three factors the one that is furthest below the
        geometric mean of its layer; None where the share is not so small."""
        heads = self.share[layer].isfinite()
        if not self.share[layer, head] < SMALL_SHARE / int(heads.sum()):
            return None
        factors = torch.stack([self.value[layer], self.place[layer], self.agreement[layer]]).clamp_min(1e-300).log()
        return REASONS[int((factors[:, head] - factors[:, heads].mean(1)).argmin())]


def output_weight(model: nn.Module, batches: Iterable[Any]) -> OutputWeight:
    """What each head adds to the output of its layer, and which factor makes it large or small.

    With f(v) = v W_O of a head (biases left out)::

        output_i = |sum_j p_ij f(v_j)|    share_h = mean_i output_i / sum over heads of the same
        output = value * place * agreement, the means over tokens i of

            value      mean_j |f(v_j)|
            place      mean_i sum_j p_ij |f(v_j)| / mean_j |f(v_j)|
            agreement  mean_i |sum_j p_ij f(v_j)| / mean_i sum_j p_ij |f(v_j)|

    The sum of norms is the norm-based attention of Kobayashi et al. 2020. A head that rests on a sink has a small
    `place`, not small weights (Gu et al. 2025, Guo et al. 2024: the sink's value is small, so that attending to it does
    next to nothing). The sums are taken by a second pass of attention in which a key's value is its norm: no map is
    made.

    Args:
        model: one whose attention `attention_blocks` knows and `capture` serves; run under no_grad.
        batches: each a mapping of keyword arguments or the only argument; padding is left out.

    Returns:
        An `OutputWeight`, cross-attention left out.

    Raises:
        UnsupportedError: what `attention_blocks` and `capture` refuse.
        ValueError: no batches.
    """
    static = circuits(model)
    blocks = {block.name: block for block in attention_blocks(model)}
    sums = {name: _Sums() for name in blocks}

    def watch(name: str, call: ServedCall, out: Tensor, stats: HeadStats) -> None:
        name = module_of(name)
        if not call.crosses:
            sums[name].add(*_of_call(blocks[name], call, out, stats))

    spec = StatSpec(entropy=False, max=False, sink=0, diagonal=None, topk=0, received=True)
    with torch.no_grad(), Capture(model, spec, watch=watch):
        for batch in each(batches):
            run(model, batch)
    ran = [name for name, one in sums.items() if one.rows]
    if not ran:
        raise ValueError("batches: expected some with tokens that attend to each other, got none")
    places = [static.layers.index(name) for name in ran]
    output, attended, value, sink, sink_value = (
        by_layer_and_head([sums[name].mean(part) for name in ran]) for part in range(5)
    )
    return OutputWeight(
        layers=tuple(ran),
        weight=static.output_norm[places, : output.shape[1]],
        ov=static.ov_norm[places, : output.shape[1]],
        output=output,
        share=output / output.nansum(1, keepdim=True),
        value=value,
        place=attended / value,
        agreement=output / attended,
        sink=sink,
        sink_value=sink_value,
    )


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two numbers per head, -1 to 1; heads without one of them are left out.

    Equal numbers share the mean of their ranks. NaN where there are fewer than two heads, or all are equal.
    """
    if one.shape != other.shape:
        raise ValueError(f"other: expected the shape of one, {tuple(one.shape)}, got {tuple(other.shape)}")
    pair = torch.stack([one, other]).flatten(1).double()
    ranks = [_ranks(numbers.numpy()) for numbers in pair[:, pair.isfinite().all(0)]]
    first, second = (rank - rank.mean() if len(rank) else rank for rank in ranks)
    spread = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / spread) if spread else float("nan")


@dataclass
class _Sums:
    """Over rows: output, attended; over tokens: value; over sequences: the sink's share and value; (H,) each."""

    totals: list[Tensor] = field(default_factory=lambda: [torch.zeros(())] * 5)
    rows: int = 0
    keys: int = 0
    sequences: int = 0

    def add(self, parts: list[Tensor], rows: int, keys: int, sequences: int) -> None:
        self.totals = [total + part.cpu() for total, part in zip(self.totals, parts, strict=True)]
        self.rows, self.keys, self.sequences = self.rows + rows, self.keys + keys, self.sequences + sequences

    def mean(self, part: int) -> Tensor:
        return self.totals[part] / (self.rows, self.rows, self.keys, self.sequences, self.sequences)[part]


def _of_call(
    block: AttentionBlock, call: ServedCall, out: Tensor, stats: HeadStats
) -> tuple[list[Tensor], int, int, int]:
    """What one call adds to the sums, and how many rows, keys and sequences."""
    weight_HVE = block.out_weight.to(out.device)
    value_BHKV = call.value.repeat_interleave(block.heads // block.key_heads, 1).double()
    norms_BHK = _norms(value_BHKV, weight_HVE)
    attended_BHN = _attended(block, call, norms_BHK)
    output_BHN = _norms(out.double(), weight_HVE)
    rows_BN = (stats.lse > -torch.inf).all(1)
    received_BHK = stats.received_mass
    assert received_BHK is not None
    keys_BK = torch.ones_like(received_BHK[:, 0], dtype=torch.bool) if call.key_mask is None else call.key_mask
    kept = rows_BN.any(1)
    norms_BHK = norms_BHK.masked_fill(~keys_BK[:, None], 0.0)[kept]
    received, most = received_BHK[kept].double().max(-1)
    per_sequence = norms_BHK.sum(-1) / keys_BK[kept].sum(-1)[:, None]
    largest = norms_BHK.gather(-1, most[..., None])[..., 0]
    parts = [
        output_BHN.transpose(1, 2)[rows_BN].sum(0),
        attended_BHN.transpose(1, 2)[rows_BN].sum(0),
        norms_BHK.sum((0, 2)),
        (received / rows_BN[kept].sum(-1)[:, None]).sum(0),
        torch.where(per_sequence > 0, largest / per_sequence, 1.0).sum(0),
    ]
    return parts, int(rows_BN.sum()), int(keys_BK[kept].sum()), int(kept.sum())


def _norms(vectors_BHNV: Tensor, weight_HVE: Tensor) -> Tensor:
    """(B, H, N) norms of v W_O, from V x V products: |v W|^2 = v (W W^T) v^T."""
    gram = weight_HVE @ weight_HVE.mT
    return ((vectors_BHNV @ gram) * vectors_BHNV).sum(-1).clamp_min(0).sqrt()


def _attended(block: AttentionBlock, call: ServedCall, norms_BHK: Tensor) -> Tensor:
    """(B, H, N) float64 sum_j p_ij n_j: attention whose values are these numbers."""
    key = call.key.repeat_interleave(block.heads // block.key_heads, 1)
    means, _ = attention(
        call.query,
        key,
        norms_BHK[..., None].to(key.dtype),
        StatSpec.none(),
        attn_mask=call.attn_mask,
        causal=call.causal,
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
        query_offset=call.query_offset,
    )
    return means[..., 0].double()


def _ranks(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 0 on; equal numbers share the mean of their ranks."""
    _, place, count = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]
