"""How much of what a layer gives at a token comes from other tokens, by norms of vectors instead of weights.

After Kobayashi et al. 2020 and 2021 (Incorporating Residual and Normalization Layers into Analysis of Masked Language
Models). They need the attention map; the same number follows from its diagonal p_ii, the heads' outputs and their
values, for what does not come from the token itself comes from others.

B sequences   N tokens   E embedding   H query heads   G key/value heads   V head dim of the value
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attncap.adapters.served import ServedCall
from attncap.analysis.batches import each, run
from attncap.analysis.blocks import AttentionBlock, attention_blocks, by_layer_and_head
from attncap.capture import Capture
from attncap.layers import module_of
from attncap.types import HeadStats, StatSpec, UnsupportedError

PRE, POST, NONE = "pre-norm", "post-norm", "attention only"

# Two ways to add up the same numbers in the model's dtype differ by less than this, relative to the largest.
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class MixingRatio:
    """Means over all tokens, float64, from 0 (a token keeps to itself) to 1 (all comes from others).

    Attributes:
        layers: names of the attention modules.
        layer: (layers,) of all heads of a layer together.
        head: (layers, heads) of each head as if it were the only one; NaN where a layer has fewer.
        kind: "pre-norm", "post-norm" or "attention only", layer by layer: what the ratio was taken of.
    """

    layers: tuple[str, ...]
    layer: Tensor
    head: Tensor
    kind: tuple[str, ...]


def mixing_ratio(model: nn.Module, batches: Iterable[Any], *, residual: bool = True) -> MixingRatio:
    """Mixing ratio of the self-attention of every layer, and of every head.

    With f_h(j) = v_j W_O of head h at key j, and x_i what the residual connection carries past the attention::

        others_i = sum_h sum_{j != i} p_ij f_h(j) = sum_h (out_i - p_ii v_i) W_O
        own_i    = sum_h p_ii f_h(i) + x_i
        ratio_i  = |T(others_i)| / (|T(others_i)| + |T(own_i)|)

    T is the identity in pre-norm models, where x_i is not normalised and f_h reads what is; in post-norm models it is
    the LayerNorm that follows, which takes vectors apart as it does their sum: (z - mean(z)) * gain, the division by
    the common deviation cancelling out. Biases of the output projection and of that LayerNorm belong to no token and
    are left out. Which of the two a layer is, is not guessed: the layer's own sum of residual and attention is found
    in its forward.

    Args:
        model: one whose attention `attention_blocks` knows and `capture` serves; run under no_grad.
        batches: each a mapping of keyword arguments or the only argument; padding is left out.
        residual: False leaves x_i and the normalisation out (Kobayashi et al. 2020).

    Returns:
        A `MixingRatio`; cross-attention, which has no own token, is not in it. A head that gives nothing has 0.

    Raises:
        UnsupportedError: a layer that does not add its attention to its input or to what its norm was given (parallel
            residuals, a norm between attention and sum, scaled residuals), by name; what `attention_blocks` and
            `capture` refuse.
        ValueError: no batches.
    """
    blocks = {block.name: block for block in attention_blocks(model)}
    sums = {name: _Sums(torch.zeros(block.heads, dtype=torch.float64)) for name, block in blocks.items()}
    calls: list[_Call] = []

    def watch(name: str, call: ServedCall, out: Tensor, stats: HeadStats) -> None:
        calls.append(_Call(blocks[module_of(name)], call, out, stats))

    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.enter_context(Capture(model, StatSpec(entropy=False, max=False, sink=0, topk=0), watch=watch))
        frames = _Frames(blocks.values(), model, undo)
        for batch in each(batches):
            run(model, batch)
            for frame in frames.take(calls):
                found = frame.ratios(residual)
                if found is not None:
                    sums[frame.call.block.name].add(*found, frame.kind(residual))
            calls.clear()
    ran = {name: one for name, one in sums.items() if one.count}
    if not ran:
        raise ValueError("batches: expected some with tokens that attend to each other, got none")
    return MixingRatio(
        layers=tuple(ran),
        layer=torch.stack([one.layer / one.count for one in ran.values()]),
        head=by_layer_and_head([one.heads / one.count for one in ran.values()]),
        kind=tuple(one.kind for one in ran.values()),
    )


@dataclass(frozen=True)
class _Call:
    block: AttentionBlock
    call: ServedCall
    out: Tensor  # (B, H, N, V)
    stats: HeadStats


@dataclass
class _Sums:
    heads: Tensor
    layer: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    count: int = 0
    kind: str = ""

    def add(self, layer: Tensor, heads: Tensor, kind: str) -> None:
        """Of one call: layer (rows,), heads (H, rows)."""
        self.layer = self.layer + layer.sum().cpu()
        self.heads = self.heads + heads.sum(-1).cpu()
        self.count += len(layer)
        self.kind = kind


@dataclass
class _Frame:
    """One forward of an attention module, (B, N, E) each."""

    block: AttentionBlock
    hidden: Tensor  # what it was given
    before: Tensor | None  # what the norm was given that gave `hidden`
    elsewhere: bool  # keys are other tokens than the queries
    given: Tensor | None = None  # what the output projection gave
    carried: Tensor | None = None  # what was added to it
    norm: nn.Module | None = None  # what that sum was given to, where it is not carried on itself
    found: _Call | None = None

    @property
    def call(self) -> _Call:
        assert self.found is not None
        return self.found

    def kind(self, residual: bool) -> str:
        if not residual:
            return NONE
        return PRE if self.norm is None else POST

    def settle(self, total: Tensor, norm: nn.Module) -> None:
        """Look for the residual in what a norm after the attention was given."""
        assert self.given is not None
        if self.before is not None and _same(total, self.before + self.given):
            self.carried = self.before
        elif _same(total, self.hidden + self.given):
            self.carried, self.norm = self.hidden, norm

    def ratios(self, residual: bool) -> tuple[Tensor, Tensor] | None:
        """(rows,) of the layer and (H, rows) of its heads, over the rows that count; None for cross-attention."""
        block, call = self.call.block, self.call.call
        if self.elsewhere or call.crosses:
            return None
        if residual and self.carried is None:
            raise UnsupportedError(
                f"model: {block.name} does not simply add its attention to its input or to what its norm was given, so "
                "the share of the residual is not known; residual=False leaves it out"
            )
        diagonal = self.call.stats.diagonal_mass
        assert diagonal is not None
        value = call.value.repeat_interleave(block.heads // block.key_heads, 1).double()
        own_BHNV = diagonal.double()[..., None] * value
        others_BHNV = self.call.out.double() - own_BHNV
        counted = (self.call.stats.lse > -torch.inf).all(1)  # (B, N)
        base = self._batch_first(self.carried)[counted].double() if residual and self.carried is not None else 0.0
        own, others, heads = torch.as_tensor(base), torch.zeros((), dtype=torch.float64), []
        for head, weight in enumerate(block.out_weight.to(value.device)):
            mine, theirs = own_BHNV[:, head][counted] @ weight, others_BHNV[:, head][counted] @ weight
            heads.append(self._ratio(theirs, mine + base, residual))
            own, others = own + mine, others + theirs
        self._check(own - base + others, counted)
        return self._ratio(others, own, residual), torch.stack(heads)

    def _ratio(self, others: Tensor, own: Tensor, residual: bool) -> Tensor:
        theirs, mine = (self._normed(part, residual).norm(dim=-1) for part in (others, own))
        return torch.where(theirs > 0, theirs / (theirs + mine), 0.0)

    def _normed(self, part: Tensor, residual: bool) -> Tensor:
        if self.norm is None or not residual:
            return part
        if not isinstance(self.norm, nn.LayerNorm):
            raise UnsupportedError(
                f"model: after {self.block.name} comes {type(self.norm).__name__}, of which attncap does not know how "
                "it takes a sum apart; nn.LayerNorm is known"
            )
        centred = part - part.mean(-1, keepdim=True)
        return centred if self.norm.weight is None else centred * self.norm.weight.double()

    def _check(self, total: Tensor, counted: Tensor) -> None:
        """The heads' parts add up to what the output projection gave."""
        assert self.given is not None
        bias = getattr(self.block.out, "bias", None)
        expected = self._batch_first(self.given)[counted]
        if not _same(expected.double(), total if bias is None else total + bias, expected.dtype):
            raise UnsupportedError(
                f"model: what {self.block.name} gives is not the sum of its heads' outputs times the weights of its "
                "output projection (adapters, gates)"
            )

    def _batch_first(self, tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        module = self.block.module
        swaps = isinstance(module, nn.MultiheadAttention) and not module.batch_first
        tensor = tensor.transpose(0, 1) if swaps else tensor
        return tensor.reshape(self.call.out.shape[0], self.call.out.shape[2], -1)


class _Frames:
    """Follows a forward: what attention modules are given, what they give, and what norms make of it."""

    def __init__(self, blocks: Iterable[AttentionBlock], model: nn.Module, undo: ExitStack) -> None:
        self._frames: list[_Frame] = []
        self._newest: tuple[Tensor, Tensor] | None = None  # (given to a norm, made by it)
        for block in blocks:
            module = block.module
            undo.callback(module.register_forward_pre_hook(self._entering(block), with_kwargs=True).remove)
            torchs = isinstance(module, nn.MultiheadAttention)
            undo.callback((module if torchs else block.out).register_forward_hook(self._gave).remove)
        for module in model.modules():
            if "norm" in type(module).__name__.lower() and not list(module.children()):
                undo.callback(module.register_forward_hook(self._normalised).remove)

    def take(self, calls: list[_Call]) -> list[_Frame]:
        """The frames of a forward that is over, each with its call."""
        frames, self._frames, self._newest = self._frames, [], None
        frames = [frame for frame in frames if frame.given is not None]
        pre_norm = any(frame.carried is not None and frame.norm is None for frame in frames)
        for frame, call in zip(frames, calls, strict=True):
            assert frame.block is call.block
            frame.found = call
            if pre_norm:  # whose first layer may have no norm before its attention
                frame.norm = None
        return frames

    def _entering(self, block: AttentionBlock) -> Any:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)]
            hidden = tensors[0]
            other = args[1] if len(args) > 1 else kwargs.get("key")
            elsewhere = any(kwargs.get(name) is not None for name in ("key_value_states", "encoder_hidden_states"))
            if isinstance(block.module, nn.MultiheadAttention):
                elsewhere = other is not hidden
            made_here = self._newest is not None and self._newest[1] is hidden
            before = self._newest[0] if self._newest is not None and made_here else None
            self._frames.append(_Frame(block, hidden, before, elsewhere))

        return enter

    def _gave(self, _module: nn.Module, _args: Any, result: Any) -> None:
        self._frames[-1].given = result[0] if isinstance(result, tuple) else result

    def _normalised(self, norm: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        self._newest = (args[0], result)
        newest = self._frames[-1] if self._frames else None
        if newest is not None and newest.given is not None and newest.carried is None:
            newest.settle(args[0], norm)


def _same(one: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> bool:
    if one.shape != other.shape:
        return False
    scale = max(float(other.abs().max()), 1e-30) if other.numel() else 1.0
    return bool(((one - other).abs() <= _CLOSE[dtype or one.dtype] * scale).all())
