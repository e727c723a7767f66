"""Masks of Transformers models, without the N x N map where that is certain.

Transformers builds one mask per forward and kind of layer and hands it to every attention call. `LazyMask` stands in
its place: it looks like the (B, 1, Q, K) mask, and becomes it as soon as model code computes with it, but an
attention call that gets it untouched reads from it what the mask was made of.

    B batch  Q query rows  K keys; positions are counted in the key tensor given to the attention call
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils


@dataclass(frozen=True)
class MaskTerms:
    """What an attention call needs to know of its mask, in the terms of `attncap.attention`."""

    attn_mask: Tensor | None
    causal: bool
    window: tuple[int, int] | None
    query_offset: int
    seen_keys: Tensor  # broadcastable to (B, H, Q), int64
    key_mask: Tensor | None = None  # (B, K) bool, False for padding; None where the mask does not tell
    row_mask: Tensor | None = None  # (B, Q) bool, padding at the rows' own positions; None where it does not tell


@dataclass(frozen=True)
class _Pattern:
    """A mask that is a rule on positions: causal or not, within a window or not."""

    causal: bool
    window: tuple[int, int] | None = None


class LazyMask(Tensor):
    """A (B, 1, Q, K) mask that is made when it is needed, in the form that is needed.

    Args:
        request: the keyword arguments with which Transformers asked for the mask.
        additive: stand for an additive mask, as eager attention has it, and not for a bool one: models that know no
            other attention add it to scores of their own.
        whole: the mask whose rows from `start` on these are.
    """

    request: Mapping[str, Any]
    _dense: Tensor | None
    _native: dict[str, Tensor | None]
    _whole: LazyMask | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, request: Mapping[str, Any], additive: bool = False, whole: LazyMask | None = None, start: int = 0
    ) -> LazyMask:
        shape = (request["batch_size"], 1, request["q_length"], request["kv_length"])
        device = torch.device(request.get("device", "cpu"))
        dtype = request.get("dtype", torch.float32) if additive else torch.bool
        mask: LazyMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return mask

    def __init__(
        self, request: Mapping[str, Any], additive: bool = False, whole: LazyMask | None = None, start: int = 0
    ) -> None:
        # A static cache gives its offset as a tensor that it changes in place later, so it is read now: one wait per
        # mask, not per layer.
        offsets = {name: int(request.get(name, 0)) for name in ("q_offset", "kv_offset")}
        self.request = {**request, **offsets}
        self._dense = None
        self._native = {}
        self._whole, self._start = whole, start

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        part = _part_of(function, args)
        if part is not None:
            return part
        scores = _added_to(function, args)
        if scores is None:
            args, kwargs = tree_map_only(LazyMask, lambda mask: mask.dense(), (args, kwargs or {}))
        else:
            args = tree_map_only(LazyMask, lambda mask: _additive(mask.dense(), scores.dtype), args)
        return function(*args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyMask(shape={tuple(self.shape)})"

    def dense(self) -> Tensor:
        """The mask itself, bool or additive, made once: an in-place change by the model stays."""
        if self._dense is None:
            if self._whole is not None:
                self._dense = self._whole.dense()[:, :, self._start : self._start + self.shape[2]]
            else:
                self._dense = whole_mask(self.request, self.dtype != torch.bool)
        return self._dense

    @property
    def _computed_with(self) -> bool:
        """Whether model code has computed with the mask, and so may have changed it."""
        return self._dense is not None or (self._whole is not None and self._whole._computed_with)

    def native(self, implementation: str) -> Tensor | None:
        """The mask as Transformers would have made it for another implementation."""
        if implementation not in self._native:
            makers = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
            made = makers[implementation](**self.request) if implementation in makers else None
            self._native[implementation] = made
        return self._native[implementation]

    @property
    def places_rows(self) -> bool:
        """Whether what the rows see depends on where they stand. If not, the mask may not know where that is."""
        pattern = None if self._computed_with else _pattern(self.request)
        return pattern is None or pattern.causal or pattern.window is not None

    @cached_property
    def terms(self) -> MaskTerms:
        """The mask as arguments of `attncap.attention`; nothing of size Q x K unless the pattern asks for it."""
        pattern = None if self._computed_with else _pattern(self.request)
        padding = self._padding
        keys, rows = self.request["kv_length"], self.request["q_length"]
        first_row, first_key = self.request["q_offset"], self.request["kv_offset"]
        key_mask = None if padding is None else padding[:, first_key : first_key + keys]
        row_mask = None if padding is None else padding[:, first_row : first_row + rows]
        if row_mask is not None and row_mask.shape[1] != rows:
            row_mask = None
        if pattern is None:
            mask = self.dense() if self._computed_with else whole_mask(self.request)
            return MaskTerms(mask, False, None, first_row - first_key, _seen(mask).sum(-1), key_mask, None)
        offset = first_row - first_key
        return MaskTerms(
            attn_mask=None if key_mask is None else key_mask[:, None, None],
            causal=pattern.causal,
            window=pattern.window,
            query_offset=offset,
            seen_keys=_seen_keys(pattern, offset, rows, keys, key_mask, torch.device(self.device)),
            key_mask=key_mask,
            # Without causality the rows may belong to another sequence than the keys (cross-attention).
            row_mask=row_mask if pattern.causal else None,
        )

    @property
    def _padding(self) -> Tensor | None:
        """(B, positions) bool, True for tokens, in the cache's positions."""
        mask = self.request.get("attention_mask")
        if mask is None:
            return None
        keys, first_key = self.request["kv_length"], self.request["kv_offset"]
        padding: Tensor = masking_utils.prepare_padding_mask(mask, keys, first_key).to(torch.bool)
        return padding


def whole_mask(request: Mapping[str, Any], additive: bool = False) -> Tensor:
    """(B, 1, Q, K) bool or additive, as it was asked for."""
    wanted = {**request, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    made: Tensor | None = masking_utils.sdpa_mask(**wanted)
    assert made is not None
    return _additive(made, request.get("dtype", torch.float32)) if additive else made


def terms_of(
    mask: Tensor | None, query: Tensor, key: Tensor, *, is_causal: bool, cached: int, length: int
) -> MaskTerms:
    """What any mask of an attention call means.

    Args:
        mask: a `LazyMask`; a bool or additive mask that the model or the user made; or None.
        query: (B, H, Q, D). key: (B, G, K, D).
        is_causal: the module's word, which counts only without a mask, as in Transformers' own functions.
        cached: how many keys the model's cache held before this forward. length: how many tokens the model was given
            now; layers may get the last of them alone.
    """
    if isinstance(mask, LazyMask):
        return mask.terms if mask.places_rows else replace(mask.terms, query_offset=cached)
    rows, keys = query.shape[2], key.shape[2]
    # A static cache has places beyond the rows, a sliding one has dropped keys.
    offset = max(0, min(cached + max(0, length - rows), keys - rows))
    if mask is None:
        # Several rows without a mask mean upper-left alignment: the keys of a static cache beyond Q are not seen.
        causal = is_causal and rows > 1
        pattern = _Pattern(causal)
        offset = 0 if causal else offset if is_causal else cached
        return MaskTerms(None, causal, None, offset, _seen_keys(pattern, offset, rows, keys, None, query.device))
    seen = _seen(mask)
    seen_keys = seen.expand(*seen.shape[:-1], keys).sum(-1)
    # Where nothing is seen an additive mask gives scores that are all the smallest number.
    row_mask = (seen_keys > 0).any(1).expand(query.shape[0], rows)
    return MaskTerms(mask, False, None, offset, seen_keys, row_mask=row_mask)


def only_keys(mask: Tensor | None, indices: Tensor, keys: int) -> Tensor:
    """A mask that lets each row see, of the keys it saw, those chosen for it: `indices` (B, Q, chosen)."""
    chosen = torch.zeros(*indices.shape[:2], keys, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter_(-1, indices.long(), True)[:, None]
    if mask is None:
        return chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _seen(mask: Tensor) -> Tensor:
    """Where a bool or additive mask lets a row see a key."""
    # An additive mask holds the smallest number, not always -inf, where nothing is to be seen.
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores, from a bool one or one that is additive already."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _part_of(function: Any, args: tuple[Any, ...]) -> LazyMask | None:
    """What a view of a mask is, where it is a mask of the same rule: all of it, or some rows in a row."""
    mask = args[0] if args else None
    if not isinstance(mask, LazyMask):
        return None
    slices_rows = function is torch.ops.aten.slice.Tensor and args[1:2] == (2,) and args[4:5] in ((), (1,))
    if not slices_rows and function not in (torch.ops.aten.alias.default, torch.ops.aten.detach.default):
        return None
    start, stop, _ = slice(*(args[2:4] or (None,))).indices(mask.shape[2])
    rows = max(0, stop - start)
    request = {**mask.request, "q_length": rows, "q_offset": mask.request["q_offset"] + start}
    return LazyMask(request, mask.dtype != torch.bool, mask, start)


def _added_to(function: Any, args: tuple[Any, ...]) -> Tensor | None:
    """The floating scores or biases that an operator adds a `LazyMask` to: a bool mask there would add 0 and 1."""
    if getattr(function, "overloadpacket", None) not in (torch.ops.aten.add, torch.ops.aten.add_):
        return None
    others = [arg for arg in args if isinstance(arg, Tensor) and not isinstance(arg, LazyMask)]
    return next((other for other in others if other.is_floating_point()), None)


def _seen_keys(
    pattern: _Pattern, offset: int, rows: int, keys: int, key_mask: Tensor | None, device: torch.device
) -> Tensor:
    """(B or 1, 1, Q): how many keys each row sees, from the ends of its range and running counts of tokens."""
    position = torch.arange(rows, device=device) + offset
    first, end = torch.zeros_like(position), torch.full_like(position, keys)
    if pattern.causal:
        end = position + 1
    if pattern.window is not None:
        left, right = pattern.window
        first = position - left if left >= 0 else first
        end = torch.minimum(end, position + right + 1) if right >= 0 else end
    first, end = first.clamp(0, keys), end.clamp(0, keys)
    if key_mask is None:
        return (end - first).clamp_min(0)[None, None]
    tokens_before = torch.nn.functional.pad(key_mask.to(torch.int64).cumsum(-1), (1, 0))
    return (tokens_before[:, end] - tokens_before[:, first]).clamp_min(0)[:, None]


def _pattern(request: Mapping[str, Any]) -> _Pattern | None:
    """The rule behind the mask function asked for, or None where it is not certainly one of Transformers' own rules."""
    if request.get("use_vmap"):
        return None
    if request.get("attention_mask") is not None and request["attention_mask"].dim() != 2:
        return None
    function = request.get("mask_function", masking_utils.causal_mask_function)
    if function is masking_utils.causal_mask_function:
        return _Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return _Pattern(causal=False)
    size = request.get("local_size")
    if isinstance(size, int) and size > 0:
        # A window of W counts the row's own token in the causal form; in the symmetric form |i - j| <= W.
        if _same_function(function, masking_utils.sliding_window_causal_mask_function(size)):
            return _Pattern(causal=True, window=(size - 1, -1))
        if _same_function(function, masking_utils.sliding_window_bidirectional_mask_function(size)):
            return _Pattern(causal=False, window=(size, size))
    return None


def _same_function(one: Any, other: Any) -> bool:
    """Whether two closures have the same code over the same values, which makes them the same function."""
    if one is other:
        return True
    if isinstance(one, (tuple, list)) and type(one) is type(other) and len(one) == len(other):
        return all(_same_function(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    if isinstance(one, (int, str)) and type(one) is type(other):
        return bool(one == other)
    if not (isinstance(one, FunctionType) and isinstance(other, FunctionType)):
        return False
    same_code = one.__code__ is other.__code__ and one.__globals__ is other.__globals__
    if not same_code or one.__defaults__ != other.__defaults__:
        return False
    cells: tuple[tuple[CellType, ...], ...] = (one.__closure__ or (), other.__closure__ or ())
    return _same_function(*(tuple(cell.cell_contents for cell in side) for side in cells))
