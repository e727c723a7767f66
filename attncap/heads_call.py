"""An attention call as torch's functions make it, which is what those who serve such calls are given.

B batch  H query heads  G key/value heads  Q query rows  K keys  D, E head dims of key and value
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HeadsCall:
    """An attention call in the form of `attncap.attention` with query_offset=0, and what is known of its tokens."""

    query: Tensor  # (B, H, Q, D)
    key: Tensor  # (B, G, K, D)
    value: Tensor  # (B, G, K, E)
    attn_mask: Tensor | None = None  # broadcastable to (B, H, Q, K), True = attend
    causal: bool = False
    scale: float | None = None
    key_mask: Tensor | None = None  # (B, K) bool, False for padding; None where the caller does not know
    crosses: bool | None = None  # the keys are other tokens than the queries; None where the caller does not know


Attend = Callable[[HeadsCall], Tensor]
"""Gives out (B, H, Q, E)."""
