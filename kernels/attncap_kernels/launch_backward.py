"""Runs the Triton kernels of a backward: levels of rows, then each gradient by the program that owns its numbers.

No two programs add to one number, so the same call gives the same bits. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncap.types import HeadStats
from attncap.validation import Call, Gradients, Upstream
from attncap_kernels import plans
from attncap_kernels.backward_extras import FEATURES_AT_ONCE, backward_features, backward_mask
from attncap_kernels.backward_keys import backward_keys
from attncap_kernels.backward_rows import backward_rows
from attncap_kernels.call import TritonCall, offsets_on
from attncap_kernels.levels import backward_levels
from attncap_kernels.records import Derivatives, Inputs, Plan, array, rows_array


def backward(given: Call, out: Tensor, stats: HeadStats, upstream: Upstream, gradients: Gradients) -> None:
    """Fill `gradients` from what the forward gave and the derivatives that come down.

    Args:
        out: (B, H, Q, E), any strides; stats: lse, and each statistic that has a derivative.
    """
    if min(given.query.numel(), given.key.numel(), given.value.numel()) == 0:
        return
    call = TritonCall(**vars(given))
    guard = torch.cuda.device(call.query.device) if call.query.is_cuda else contextlib.nullcontext()
    with guard:
        _Backward.of(call, out, stats, upstream).fill(gradients)


@dataclass(frozen=True)
class _Backward:
    """A call, and what kernels of its backward are given."""

    call: TritonCall
    weights: _Weights
    given: Derivatives
    wide: bool

    @classmethod
    def of(cls, call: TritonCall, out: Tensor, stats: HeadStats, upstream: Upstream) -> _Backward:
        weights = _Weights(call, stats, upstream)
        given = weights.given()
        rows = (call.query, out) if upstream.out is None else (call.query, out, upstream.out)
        self = cls(call, weights, given, call.is_wide(*rows))
        self._levels(out)
        return self

    def fill(self, gradients: Gradients) -> None:
        if gradients.level is not None:
            gradients.level.copy_(self.given.level)
        if gradients.query is not None:
            self._rows(gradients.query)
        value = None if self.given.out is None else gradients.value
        if gradients.key is not None or value is not None:
            self._keys(gradients.key, value)
        if gradients.attn_mask is not None:
            self._mask(gradients.attn_mask)
        if gradients.key_features is not None and self.given.feature_mass is not None:
            self._features(gradients.key_features)
        if gradients.sink_logits is not None:
            gradients.sink_logits.copy_(self.weights.by_sink_logits(self.given.level))

    def _plan(self, tiles: plans.Tiles, **changes: Any) -> Plan:
        last = {"OFFSETS": self.given.offset_mass, "TAGS": self.given.tag_mass, "FEATURES": self.given.feature_mass}
        last |= {"CHOSEN": self.given.chosen}
        sizes = {name: 0 if tensor is None else tensor.shape[-1] for name, tensor in last.items()}
        return self.call.plan(tiles, **sizes, WIDE=self.wide, **changes)

    def _inputs(self, table: Tensor | None) -> Inputs:
        call = self.call
        rows = {"query": rows_array(call.query), "key": rows_array(call.key), "value": rows_array(call.value)}
        return call.inputs(table)._replace(**rows)

    def _tiles(self, *, of_keys: bool = False) -> plans.Tiles:
        call, given = self.call, self.given
        dear = (given.distance, given.collision, given.received_mass, given.tag_mass, given.feature_mass)
        heavy = any(tensor is not None for tensor in dear)
        heavy = heavy or (given.chosen is not None and given.chosen.shape[-1] > 1)
        few = given.entropy is not None or given.chosen is not None
        masked = call.mask != 0 or call.options.softcap > 0
        return plans.backward_tiles(call.pad, call.query.dtype, of_keys=of_keys, masked=masked, few=few, heavy=heavy)

    def _levels(self, out: Tensor) -> None:
        call = self.call
        tiles = self._tiles()
        blocks, table = call.blocks(tiles.rows)
        rows, keys, offset = call.lengths
        backward_levels[(blocks * call.heads,)](
            self._inputs(table), self.given, array(out), self.weights.first_level, self.weights.largest_key,
            *call.numbers, blocks if call.packed else rows, keys, offset, call.query.shape[2], *call.window,
            WALK=self.weights.walk, P=self._plan(tiles), **tiles.options,
        )  # fmt: skip

    def _rows(self, gradient: Tensor) -> None:
        call = self.call
        tiles = self._tiles()
        blocks, table = call.blocks(tiles.rows)
        rows, keys, offset = call.lengths
        backward_rows[(blocks * call.heads,)](
            self._inputs(table), self.given, array(gradient), *call.numbers, blocks if call.packed else rows, keys,
            offset, call.query.shape[2], *call.window, *call.band, P=self._plan(tiles), **tiles.options,
        )  # fmt: skip

    def _keys(self, key_gradient: Tensor | None, value_gradient: Tensor | None) -> None:
        call = self.call
        tiles = self._tiles(of_keys=True)
        blocks, table = call.blocks(tiles.keys, of_keys=True)
        rows, keys, offset = call.lengths
        backward_keys[(blocks * call.key.shape[1],)](
            self._inputs(table), self.given, array(key_gradient), array(value_gradient), *call.numbers, rows,
            blocks if call.packed else keys, offset, call.query.shape[2], *call.window, *call.band,
            P=self._plan(tiles, TRANSPOSED=True), **tiles.options,
        )  # fmt: skip

    def _mask(self, gradient: Tensor) -> None:
        call = self.call
        tiles = self._tiles()
        rows, keys, offset = call.lengths
        over = [size == 1 for size in gradient.shape]
        counts = (call.query.shape[0], call.heads, -(-rows // tiles.rows), -(-keys // tiles.keys))
        programs = 1
        for count, summed in zip(counts, over, strict=True):
            programs *= 1 if summed else count
        names = ("OVER_BATCHES", "OVER_HEADS", "OVER_ROWS", "OVER_KEYS")
        backward_mask[(programs,)](
            self._inputs(None), self.given, array(gradient), *call.numbers, rows, keys, offset, call.query.shape[2],
            *call.window, *call.band, counts[0], **dict(zip(names, over, strict=True)), P=self._plan(tiles),
            **tiles.options,
        )  # fmt: skip

    def _features(self, gradient: Tensor) -> None:
        call = self.call
        tiles = self._tiles(of_keys=True)
        blocks, table = call.blocks(tiles.keys, of_keys=True)
        rows, keys, offset = call.lengths
        backward_features[(blocks, -(-gradient.shape[-1] // FEATURES_AT_ONCE.value))](
            self._inputs(table), self.given, array(gradient), *call.numbers, rows, blocks if call.packed else keys,
            offset, call.query.shape[2], *call.window, P=self._plan(tiles), **tiles.options,
        )  # fmt: skip


class _Weights:
    """Derivatives by statistics, 0 for rows that do not count, and what they add to the level of each row."""

    def __init__(self, call: TritonCall, stats: HeadStats, upstream: Upstream) -> None:
        self.call, self.stats, self.upstream = call, stats, upstream
        self._counted: dict[str, Tensor] = {}
        self.chosen, self.chosen_key = self._chosen()
        self.largest_key = self.chosen_key if stats.topk_index is None else None  # still to be found
        received = upstream.received_mass
        self.received = None if received is None else received.float().contiguous()
        self.walk = call.mask == 2 or received is not None or self.largest_key is not None
        self.first_level = self._first_level()

    def of(self, name: str) -> Tensor | None:
        """(B, H, Q, ...) the derivative by a statistic, 0 for rows that do not count."""
        tensor: Tensor | None = getattr(self.upstream, name)
        if tensor is None:
            return None
        if name not in self._counted:
            counted = self.counts if tensor.dim() == 3 else self.counts[..., None]
            self._counted[name] = torch.where(counted, tensor.float(), 0.0).contiguous()
        return self._counted[name]

    @functools.cached_property
    def sees(self) -> Tensor:
        return self.stats.lse != -torch.inf

    @functools.cached_property
    def counts(self) -> Tensor:
        mask = self.call.extras.query_mask
        return self.sees if mask is None else self.sees & mask[:, None]

    def given(self) -> Derivatives:
        call, new = self.call, torch.empty_like
        lse = self.stats.lse.contiguous()
        offsets = self.of("offset_mass")
        diagonal = call.spec.diagonal or 0
        least, largest = min(-diagonal, *call.spec.offsets, 0), max(diagonal, *call.spec.offsets, 0)
        return Derivatives(
            out=rows_array(self.upstream.out),
            lse=lse,
            level=new(lse),
            bits=new(lse),
            peak=new(lse) if call.mask == 2 else None,
            **{name: self.of(name) for name in ("entropy", "collision", "sink_mass", "diagonal_mass", "distance")},
            offset_mass=offsets,
            offsets=None if offsets is None else offsets_on(call.spec.offsets, call.query.device),
            least_offset=least,
            largest_offset=largest,
            tag_mass=self.of("tag_mass"),
            feature_mass=self.of("feature_mass"),
            received_mass=self.received,
            chosen=self.chosen,
            chosen_key=self.chosen_key,
            total_keys=call.key.shape[2],
        )

    def _chosen(self) -> tuple[Tensor | None, Tensor | None]:
        """(derivatives by scores of chosen keys, those keys): the largest first, whose key may still be to be found."""
        largest, topk, keys = self.of("max_logit"), self.of("topk_prob"), self.stats.topk_index
        if topk is not None and keys is not None and self.stats.topk_prob is not None:
            topk = topk * self.stats.topk_prob
            if largest is not None:
                topk[..., 0] += largest
            return topk, keys.contiguous()
        if largest is None:
            return None, None
        keys = torch.empty_like(largest, dtype=torch.int32)[..., None] if keys is None else keys[..., :1]
        return largest[..., None], keys.contiguous()

    def _first_level(self) -> Tensor | None:
        """What statistics of a row add to its level."""
        by_lse = self.of("lse")
        total = None if by_lse is None else -by_lse
        names = ("entropy", "sink_mass", "diagonal_mass", "distance", "null_mass", "offset_mass", "tag_mass")
        for name in (*names, "feature_mass", "topk_prob", "collision"):
            weight, statistic = self.of(name), getattr(self.stats, name)
            if weight is None:
                continue
            part = weight * statistic if weight.dim() == 3 else (weight * statistic).sum(-1)
            if name == "collision":
                part = 2 * part
            total = part if total is None else total + part
        return total

    def by_sink_logits(self, level: Tensor) -> Tensor:
        """(H,) sum of p_i0 (G_i0 - level_i) over rows."""
        assert self.call.extras.sink_logits is not None
        sink = self.call.extras.sink_logits.float()[None, :, None]
        held = self.sees & (sink > -torch.inf)
        log_null = torch.where(held, sink - self.stats.lse, 0.0)
        by_null = -level
        null_mass, entropy = self.of("null_mass"), self.of("entropy")
        if null_mass is not None:
            by_null = by_null + null_mass
        if entropy is not None:
            by_null = by_null - entropy * log_null
        return torch.where(held, log_null.exp() * by_null, 0.0).sum((0, 2))
