"""What a call is compiled for, and the tables of its packed sequences."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from attncap.device_tables import on_device
from attncap.validation import Call, Span
from attncap_kernels import plans
from attncap_kernels.records import Inputs, Plan, array

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256
WIDE_STRIDE = 1 << 23  # times the rows or columns of a tile it passes 2^31


def lacks(query: Tensor, value: Tensor) -> str | None:
    """What keeps the kernels from serving a call, or None."""
    if query.dtype not in DTYPES:
        return f"it serves float32, bfloat16 and float16, got {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > LARGEST_HEAD_DIM:
        return f"it serves head dims up to {LARGEST_HEAD_DIM}, got {query.shape[-1]} and {value.shape[-1]} (value)"
    if query.device.type != "cuda" and not plans.INTERPRETED:
        return f"it serves tensors on a GPU, got {query.device}"
    return None


class TritonCall(Call):
    """A call as the Triton kernels take it."""

    @functools.cached_property
    def window(self) -> tuple[int, int]:
        """(left, right) with the causal mask as right = 0, and -1 where every key lies within."""
        left, right = self.options.window
        if self.options.causal:
            right = 0
        last_positions = [rows - 1 + offset for _, _, rows, _, _, offset in self.sequences]
        if left >= max(last_positions):
            left = -1
        if right >= 0 and all(offset + right >= keys - 1 for *_, keys, offset in self.sequences):
            right = -1
        return left, right

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def longest(self) -> tuple[int, int]:
        """(rows, keys) of the longest sequence."""
        return max(sequence[2] for sequence in self.sequences), max(sequence[4] for sequence in self.sequences)

    @property
    def group(self) -> int:
        """Query heads whose rows share a tile: all those of a key head, where each has few rows."""
        group = self.heads // self.key.shape[1]
        return group if self.longest[0] * group <= plans.DECODING_ROWS * 4 and self.longest[0] <= 8 else 1

    @property
    def mask(self) -> int:
        mask = self.extras.attn_mask
        return 0 if mask is None else 1 if mask.dtype == torch.bool else 2

    def plan(self, tiles: plans.Tiles, **changes: Any) -> Plan:
        """What kernels are compiled for, with `changes`."""
        left, right = self.window
        dims = {"D": self.query.shape[-1], "E": self.value.shape[-1]}
        precise = self.query.dtype == torch.float32 and _precision(self.query) == "ieee"
        fields = {
            "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.keys,
            **dims,
            **{f"PAD_{name}": _padded(size) for name, size in dims.items()},
            "STEP_D": min(_padded(self.query.shape[-1]), plans.STEP_D if precise else LARGEST_HEAD_DIM),
            "GROUP": 1,
            "PARTS": 1,
            "LEFT": left >= 0,
            "RIGHT": right >= 0,
            "MASK": self.mask,
            "SOFTCAP": self.options.softcap > 0,
            "OFFSETS": 0,
            "TAGS": 0,
            "FEATURES": 0,
            "TOPK": 0,
            "CLASSES": 1,
            "CHOSEN": 0,
            "TRANSPOSED": False,
            "WIDE": self.is_wide(),
            "DOT": _precision(self.query),
        }
        return Plan.of(**(fields | changes))

    def inputs(self, tiles: Tensor | None) -> Inputs:
        extras = self.extras
        return Inputs(
            query=array(self.query),
            key=array(self.key),
            value=array(self.value),
            attn_mask=array(extras.attn_mask),
            sink_logits=array(extras.sink_logits),
            query_mask=array(extras.query_mask),
            query_tags=array(extras.query_tags),
            key_tags=array(extras.key_tags),
            key_features=array(extras.key_features),
            heads=self.heads,
            key_heads=self.key.shape[1],
            sequences=None if tiles is None else _sequences(tuple(self.sequences), self.query.device)[0],
            tiles=tiles,
            part_rows=self.query.shape[0] * self.heads * self.query.shape[2],
        )

    @property
    def numbers(self) -> tuple[float, float, float]:
        """(sign, scale, softcap): a scale of 0 is a query of 0."""
        scale = self.options.scale
        sign = 0.0 if scale == 0 else -1.0 if scale < 0 else 1.0
        return sign, abs(scale) or 1.0, self.options.softcap or 1.0

    @property
    def band(self) -> tuple[int, int]:
        """(keys of the sink, reach of the diagonal)."""
        return self.spec.sink, self.spec.diagonal or 0

    @property
    def pad(self) -> int:
        """The larger of the padded head dims."""
        return _padded(max(self.query.shape[-1], self.value.shape[-1]))

    def is_wide(self, *others: Tensor) -> bool:
        """Whether 32 bits do not hold a step within a tile of keys, values or `others`."""
        return max(max(tensor.stride()[2:]) for tensor in (self.key, self.value, *others)) >= WIDE_STRIDE

    def tiles(self, rows: int, topk: int = 0, *, tags: bool = False, later: bool = False) -> plans.Tiles:
        """Tiles for `rows` rows a head (or group of heads), a top `topk`, and tags or features."""
        masked = self.mask != 0 or self.options.softcap > 0
        return plans.tiles_for(self.pad, self.query.dtype, rows, topk, tags=tags, masked=masked, later=later)

    def blocks(self, size: int, *, of_keys: bool = False, group: int = 1) -> tuple[int, Tensor | None]:
        """(tiles of `size` rows or keys of one head, over all batch entries or sequences; their table if packed)."""
        lengths = [sequence[4] if of_keys else sequence[2] * group for sequence in self.sequences]
        counts = tuple(-(-length // size) for length in lengths)
        return sum(counts), _tile_table(counts, self.query.device)[0] if self.packed else None

    @property
    def lengths(self) -> tuple[int, int, int]:
        """(rows, keys, offset) of every sequence, where they are not packed."""
        _, _, rows, _, keys, offset = self.sequences[0]
        return rows, keys, offset


@on_device
def _offsets(offsets: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [offsets]


def offsets_on(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """The offsets of a call as kernels read them."""
    return _offsets(offsets, device)[0]


def _padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def _precision(query: Tensor) -> str:
    """float32 is multiplied as such unless torch was told otherwise; "high" keeps nearly all of its digits."""
    if query.dtype != torch.float32 or torch.version.hip or plans.INTERPRETED:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


@on_device
def _sequences(sequences: tuple[Span, ...]) -> list[list[tuple[int, ...]]]:
    return [[sequence[1:] for sequence in sequences]]


@on_device
def _tile_table(counts: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """(sequence, tile) of each tile, later tiles first."""
    return [[(index, tile) for index, count in enumerate(counts) for tile in reversed(range(count))]]
