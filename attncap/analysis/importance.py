"""How much the loss would change if a head gave a little less: its importance by the gradient.

B sequences   N tokens   H heads   V head dim of the value
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from attncap.analysis.ablation import ZERO, pruning_curve
from attncap.analysis.batches import Loss, some, token_mask
from attncap.analysis.blocks import AttentionBlock, Edit, attention_blocks, by_layer_and_head


def head_importance(model: nn.Module, batches: Sequence[Any], loss: Loss) -> Tensor:
    """Mean over tokens of the absolute derivative of the loss by a gate on each head (Michel et al. 2019).

    With a gate g = 1 that multiplies what a head gives to the output projection at one token, out_i::

        I_h = mean_i abs(dloss / dg_i) = mean_i abs(<dloss / dout_i, out_i>)

    The absolute value is taken token by token, as Michel et al. do. It scales with the loss: a loss that is a mean
    over many tokens gives small numbers. Only torch's own autograd is used, on the model's own attention; gradients
    of parameters are left as they were. Where a model is trained anyway, ``capture(model, importance=True)`` counts
    the same from its own backwards.

    Args:
        model: one whose attention `attention_blocks` knows; its mode (train or eval) stays.
        batches: padding by a 2-D ``attention_mask`` is left out where a batch is a mapping.
        loss: of the model and a batch, a scalar with a gradient.

    Returns:
        (layers, heads) float64; NaN where a layer has fewer heads or was not run.

    Raises:
        TypeError, ValueError: no batches; the loss is no scalar tensor, or does not depend on any head.
        UnsupportedError: the layout of the weights is not known.
    """
    blocks = attention_blocks(model)
    gates = _Gates(blocks)
    with ExitStack() as undo, torch.enable_grad():
        for block in blocks:
            block.edit_heads(undo, gates.on(block))
        for batch in some(batches):
            gates.backward(loss(model, batch), batch)
    return by_layer_and_head([gates.importance(block) for block in blocks])


def leave_one_out(model: nn.Module, batches: Sequence[Any], loss: Loss, how: str = ZERO) -> Tensor:
    """How much the mean loss rises without a head, heads taken away one at a time (Michel et al. 2019, table 1)::

        loss without the head - loss of the whole model

    It takes a forward over all batches for every head, and needs no gradient: for a loss that is smallest for the
    model as it is (a distance from its own output), where that is 0, or for one that has none.

    Args:
        model, batches: as in `head_importance`. loss: of the model and a batch, a number; called under no_grad.
        how: as in `ablate`.

    Returns:
        (layers, heads) float64; NaN where a layer has fewer heads.

    Raises:
        ValueError, UnsupportedError: as `pruning_curve`.
    """
    (whole,) = pruning_curve(model, batches, loss, [], how=how)
    rises = []
    for layer, block in enumerate(attention_blocks(model)):
        losses = [
            pruning_curve(model, batches, loss, [(layer, head)], how=how, steps=[1])[0].loss
            for head in range(block.heads)
        ]
        rises.append(torch.tensor(losses, dtype=torch.float64) - whole.loss)
    return by_layer_and_head(rises)


class _Gates:
    """One gate of 1 per token and head, and what the derivatives by them add up to."""

    def __init__(self, blocks: Sequence[AttentionBlock]) -> None:
        self._sums = {block: torch.zeros(block.heads, dtype=torch.float64) for block in blocks}
        self._counts = dict.fromkeys(blocks, 0)
        self._open: list[tuple[AttentionBlock, Tensor, Tensor]] = []

    def on(self, block: AttentionBlock) -> Edit:
        def edit(heads: Tensor) -> Tensor:
            gate = torch.ones(heads.shape[:-1], device=heads.device, dtype=heads.dtype, requires_grad=True)
            self._open.append((block, gate, heads.detach()))
            return heads * gate[..., None]

        return edit

    def backward(self, loss: Any, batch: Any) -> None:
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss: expected a scalar tensor, got {type(loss).__name__}")
        if loss.dim() or not loss.requires_grad:
            got = f"shape {tuple(loss.shape)}" if loss.dim() else "one that depends on no head"
            raise ValueError(f"loss: expected a scalar that depends on the heads, got {got}")
        opened, self._open = self._open, []
        gradients = torch.autograd.grad(loss, [gate for _, gate, _ in opened], allow_unused=True)
        for (block, _, heads), gradient in zip(opened, gradients, strict=True):
            mask = token_mask(batch, heads)
            rows = heads[..., 0] if gradient is None else gradient
            rows = rows.flatten(0, -2) if mask is None else rows[mask]
            if gradient is not None:
                self._sums[block] += rows.double().abs().sum(0).cpu()
            self._counts[block] += len(rows)

    def importance(self, block: AttentionBlock) -> Tensor:
        count = self._counts[block]
        return self._sums[block] / count if count else torch.full((block.heads,), torch.nan, dtype=torch.float64)
