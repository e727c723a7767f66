"""Plain torch modules that attend, captured and held against attention maps computed in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import attncap
from tests.test_capture import FULL

WIDTH, HEADS = 8, 2


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padding(lengths: list[int], longest: int) -> Tensor:
    """(B, longest) bool, True for padding on the right."""
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]


class Attention(nn.Module):
    """Self- or cross-attention that calls a function of torch's signature."""

    def __init__(self, function: Callable[..., Tensor] = F.scaled_dot_product_attention, **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.queries, self.others = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def projected(self, tokens: Tensor, context: Tensor) -> list[Tensor]:
        parts = [self.queries(tokens), *self.others(context).chunk(2, -1)]
        return [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts]

    def forward(self, tokens: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        heads = self.projected(tokens, tokens if context is None else context)
        return self.function(*heads, attn_mask=mask, **self.options).transpose(1, 2).flatten(2)

    def map(self, tokens: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The map p (B, H, Q, K) in float64."""
        twin = copy.deepcopy(self).double()
        query, key, _ = twin.projected(tokens.double(), (tokens if context is None else context).double())
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if self.options.get("is_causal"):
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1).nan_to_num()


class MapKeeper(nn.MultiheadAttention):
    """Keeps the map of its newest call."""

    prob: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, self.prob = super().forward(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
        return out, None


def maps_in_float64(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Name -> map p of every nn.MultiheadAttention, by torch's own slow path in float64."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MapKeeper
    both = tree_map_only(Tensor, lambda one: one.double() if one.is_floating_point() else one, (args, kwargs))
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        twin(*both[0], **both[1])
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    return {name: module.prob.nan_to_num() for name, module in twin.named_modules() if isinstance(module, MapKeeper)}


def capture_of(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[attncap.Capture, Any]:
    """(capture, what the model gave inside it), the outputs being equal to those before and after it."""
    with torch.no_grad():
        before = model(*args, **kwargs)
        with attncap.capture(model, FULL, keep="last") as cap:
            inside = model(*args, **kwargs)
        after = model(*args, **kwargs)
    for one, other, last in zip(*(x if isinstance(x, tuple) else (x,) for x in (before, inside, after)), strict=True):
        if one is not None:
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
            assert torch.equal(last, one)
    return cap, inside


def every_row(batch: int, rows: int) -> Tensor:
    return torch.ones(batch, rows, dtype=torch.bool)
