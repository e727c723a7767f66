"""What analyses run a model on: batches, the rows of them that are tokens, and losses.

B sequences   N tokens   H heads   V head dim of the value
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], "Tensor | float"]
"""Of a model and a batch."""


def run(model: nn.Module, batch: Any) -> Any:
    """The model's forward: a mapping gives keyword arguments, anything else is the only argument."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def token_mask(batch: Any, heads: Tensor) -> Tensor | None:
    """(B, N) bool: rows of heads (B, N, H, V) that are tokens by the batch's attention_mask; None if it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    fits = isinstance(mask, Tensor) and mask.dim() == 2 and heads.dim() == 4 and mask.shape == heads.shape[:2]
    return mask.to(heads.device, torch.bool) if fits else None  # type: ignore[union-attr]
