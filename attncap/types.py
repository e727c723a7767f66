"""What is asked for (StatSpec), what is given back (HeadStats), and how attncap says no (errors).

Dimension letters used throughout the project:

    B batch   H query heads   G key/value heads (H % G == 0)   Q query rows   K keys
    D query/key head dimension   V value head dimension
    T tags    F features      O offsets    N any length
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.export
from torch import Tensor

from attncap.display import SmallMap, maps_html

MAX_TOPK = 64
MAX_POSITION = 2**30  # positions, lengths and offsets stay below this, so that 32-bit sums of two never overflow


class AttncapError(Exception):
    """Base of every error that is attncap's own."""


class UnsupportedError(AttncapError, NotImplementedError):
    """An implementation asked for by name cannot serve this call; the message says what it lacks."""


class MissingExtraError(AttncapError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def _as_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as a plain int within [low, high]; numpy integers are welcome, bools are not."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, np.bool_, Tensor)):
        raise TypeError(f"StatSpec.{name}: expected an int, got {type(value).__name__} ({value!r})")
    if number < low or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"StatSpec.{name}: expected an int {expected}, got {number}")
    return number


@dataclass(frozen=True)
class StatSpec:
    """Which statistics to capture. What is off costs nothing; ``lse`` is always given.

    Attributes:
        entropy: Shannon entropy of each row, in nats.
        max: largest score of each row, over keys only (``max_prob`` follows as exp(max_logit - lse)).
        sink: probability on keys 0 .. sink-1; 0 turns it off.
        diagonal: probability on keys with ``|j - pos_i| <= diagonal``; None turns it off.
        topk: how many of the largest probabilities to keep, with their keys; 0 turns it off, up to 64.
        offsets: probability at key ``pos_i + offset`` for each offset (-1 previous, +1 next token).
        distance: mean ``|pos_i - j|`` under p, in tokens.
        collision: sum of squared probabilities; its inverse is the effective number of keys.
        received: probability each key receives, summed over the counted rows.
    """

    entropy: bool = True
    max: bool = True
    sink: int = 4
    diagonal: int | None = 0
    topk: int = 8
    offsets: tuple[int, ...] = ()
    distance: bool = False
    collision: bool = False
    received: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {}
        for name in ("entropy", "max", "distance", "collision", "received"):
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"StatSpec.{name}: expected a bool, got {type(value).__name__} ({value!r})")
            checked[name] = bool(value)
        checked["sink"] = _as_int("sink", self.sink, 0, MAX_POSITION)
        checked["topk"] = _as_int("topk", self.topk, 0, MAX_TOPK)
        if self.diagonal is not None:
            checked["diagonal"] = _as_int("diagonal", self.diagonal, 0, MAX_POSITION)
        if not isinstance(self.offsets, (tuple, list)):
            raise TypeError(f"StatSpec.offsets: expected a tuple of ints, got {type(self.offsets).__name__}")
        checked["offsets"] = tuple(_as_int("offsets", offset, -MAX_POSITION, MAX_POSITION) for offset in self.offsets)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def none(cls) -> StatSpec:
        """Every statistic off (``lse`` stays)."""
        return cls(entropy=False, max=False, sink=0, diagonal=None, topk=0)

    @classmethod
    def all(cls, *, topk: int = 8, offsets: tuple[int, ...] = (-1, 1)) -> StatSpec:
        """Every statistic on."""
        return cls(topk=topk, offsets=offsets, distance=True, collision=True, received=True)


@dataclass(eq=False)  # two of them cannot be told equal by one bool
class HeadStats:
    """Statistics of every head's attention distribution; None where not asked for.

    float32 (float64 for float64 inputs); ``topk_index`` is int32. In ``attention_varlen`` the
    leading (B, H, Q) is (H, total rows). Masses are probabilities summed over keys.
    """

    lse: Tensor  # (B, H, Q) log of the softmax normaliser, nats; -inf where a row sees no key
    max_logit: Tensor | None = None  # (B, H, Q) largest score over seen keys
    entropy: Tensor | None = None  # (B, H, Q) nats, null outcome included
    collision: Tensor | None = None  # (B, H, Q) sum_j p_ij^2
    sink_mass: Tensor | None = None  # (B, H, Q)
    diagonal_mass: Tensor | None = None  # (B, H, Q)
    distance: Tensor | None = None  # (B, H, Q) tokens
    null_mass: Tensor | None = None  # (B, H, Q) only with sink_logits
    offset_mass: Tensor | None = None  # (B, H, Q, O) in the order of StatSpec.offsets
    tag_mass: Tensor | None = None  # (B, H, Q, T) only with query_tags and key_tags
    feature_mass: Tensor | None = None  # (B, H, Q, F) only with key_features
    topk_prob: Tensor | None = None  # (B, H, Q, k) falling probability, ties by rising index
    topk_index: Tensor | None = None  # (B, H, Q, k) key positions, -1 where fewer than k are seen
    received_mass: Tensor | None = None  # (B, H, K)

    @property
    def max_prob(self) -> Tensor | None:
        """exp(max_logit - lse), the row's largest probability over keys; 0 for rows that see no key."""
        if self.max_logit is None:
            return None
        lowest = torch.finfo(self.lse.dtype).min  # for rows that see no key, where both are -inf
        return torch.exp(self.max_logit - self.lse.clamp_min(lowest))

    @property
    def topk_mass(self) -> Tensor | None:
        """Sum of the k largest probabilities."""
        return None if self.topk_prob is None else self.topk_prob.sum(-1)

    def _repr_html_(self) -> str:
        """What a notebook shows: means over the rows that see a key, a small map of sequences by heads each."""
        seen = self.lse > -torch.inf
        maps = []
        for name, value in self.items():
            if name in ("topk_index", "topk_prob"):
                continue
            for place, one in enumerate(value.unbind(-1) if value.dim() > self.lse.dim() else [value]):
                rows = seen if one.shape == seen.shape else torch.ones_like(one, dtype=torch.bool)
                mean = torch.where(rows, one, 0).double().sum(-1) / rows.sum(-1)
                title = f"{name}[..., {place}]" if value.dim() > self.lse.dim() else name
                maps.append(SmallMap(title, mean.reshape(-1, mean.shape[-1]).tolist()))
        note = "Means over the rows that see a key; rows are sequences, columns heads."
        return maps_html(f"HeadStats {tuple(self.lse.shape)}", note, maps)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every statistic that was captured."""
        for name in STATISTIC_NAMES:
            value = getattr(self, name)
            if value is not None:
                yield name, value


# So that torch.export, vmap and tree_map see the tensors inside.
torch.export.register_dataclass(HeadStats)

STATISTIC_NAMES: tuple[str, ...] = tuple(field.name for field in fields(HeadStats))
