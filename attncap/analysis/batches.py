"""What analyses run a model on: batches, the rows of them that are tokens, and losses.

B sequences   N tokens   H heads   V head dim of the value
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], "Tensor | float"]
"""Of a model and a batch."""


def each(batches: Iterable[Any], name: str = "batches") -> Iterable[Any]:
    """Batches to be run one after another; a batch by itself is refused, for its keys or rows are no batches."""
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"{name}: expected several of them, as in [batch], got {type(batches).__name__}")
    return batches


def some(batches: Iterable[Any]) -> Iterable[Any]:
    """As `each`, for those that run several times: at least one."""
    given = each(batches)
    if not isinstance(given, Sized):
        raise TypeError(f"batches: expected a list, to be run several times, got {type(given).__name__}")
    if not len(given):
        raise ValueError("batches: expected at least one, got none")
    return given


def run(model: nn.Module, batch: Any) -> Any:
    """The model's forward: a mapping gives keyword arguments, anything else is the only argument."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def token_mask(batch: Any, heads: Tensor) -> Tensor | None:
    """(B, N) bool: rows of heads (B, N, H, V) that are tokens by the batch's attention_mask; None if it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    fits = isinstance(mask, Tensor) and mask.dim() == 2 and heads.dim() == 4 and mask.shape == heads.shape[:2]
    return mask.to(heads.device, torch.bool) if fits else None  # type: ignore[union-attr]
