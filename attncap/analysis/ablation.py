"""Switching heads off, and the loss of a model as more and more of them are.

B sequences   N tokens   H heads   V head dim of the value
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attncap.analysis.batches import Loss, each, run, some, token_mask
from attncap.analysis.blocks import AttentionBlock, Edit, attention_blocks, heads_by_block

ZERO, MEAN, UNIFORM = "zero", "mean", "uniform"
WAYS = (ZERO, MEAN, UNIFORM)

Heads = Iterable[tuple[str | int, int]]


@contextmanager
def ablate(model: nn.Module, heads: Heads, how: str = ZERO, *, batches: Iterable[Any] | None = None) -> Iterator[None]:
    """Inside the block these heads do not work; afterwards the model is as it was, also after an exception.

    With out_h what a head gives to the output projection::

        "zero"     out_h = 0
        "mean"     out_h = its mean over all tokens of `batches`
        "uniform"  out_h = mean of the values that each row sees: attention with scores of 0 (Kovaleva et al. 2019)

    The model may be trained, captured or generate inside the block. In a capture, which sees the attention itself, a
    head ablated by "uniform" has uniform statistics, and by the other two the ones it has anyway.

    Args:
        model: one whose attention `attention_blocks` knows.
        heads: pairs (layer, head); a layer is its index or the name of its attention module, as in `capture`.
        batches: only for "mean": what the model is run on once, under no_grad, each a mapping of keyword arguments or
            the only argument. Padding by a 2-D ``attention_mask`` is left out.

    Raises:
        TypeError, ValueError: an argument is not what it should be; the message names it.
        UnsupportedError: the layout of the weights is not known; for "uniform" also heads whose scores do not come
            from the query alone (learned sinks, relative position biases).
    """
    if how not in WAYS:
        raise ValueError(f"how: expected one of {', '.join(WAYS)}, got {how!r}")
    if (batches is None) == (how == MEAN):
        expected = "batches to take the mean over" if batches is None else 'None, for they are only for "mean"'
        raise ValueError(f"batches: expected {expected}, got {type(batches).__name__}")
    chosen = heads_by_block(attention_blocks(model), heads)
    means = {} if batches is None else _means(model, chosen, batches)
    with ExitStack() as undo:
        for block, numbers in chosen.items():
            if how == UNIFORM:
                block.zero_queries(undo, numbers)
            else:
                block.edit_heads(undo, _replacing(numbers, means.get(block)))
        yield


@dataclass(frozen=True)
class PruningPoint:
    """The mean loss without `removed` heads, `newest` being those that the point before still had."""

    removed: int
    newest: tuple[tuple[int, int], ...]
    loss: float


def pruning_curve(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    ranking: Tensor | Sequence[tuple[int, int]],
    *,
    how: str = ZERO,
    steps: Sequence[int] | None = None,
) -> tuple[PruningPoint, ...]:
    """The loss as heads are removed one after another (Michel et al. 2019, figure 3).

    Args:
        batches: what `loss` is the mean over, with equal weights; also what "mean" ablation takes its means of.
        loss: of the model and a batch, a number; called under no_grad.
        ranking: which heads go first: pairs (layer, head), or a number for each, (layers, heads), of which the
            smallest go first and NaN stays (importance, as of `head_importance`; ties by layer, then head).
        how: as in `ablate`.
        steps: numbers of heads to measure at, rising; None for every one from 0 to all that are ranked.

    Returns:
        One point a step.

    Raises:
        TypeError, ValueError, UnsupportedError: as `ablate`; no batches; steps that do not rise or are out of range.
    """
    some(batches)
    order = _order(ranking)
    counts = list(range(len(order) + 1) if steps is None else steps)
    if counts != sorted(set(counts)) or any(not 0 <= count <= len(order) for count in counts):
        raise ValueError(f"steps: expected rising numbers from 0 to {len(order)}, got {counts}")
    points: list[PruningPoint] = []
    before = 0
    for count in counts:
        with torch.no_grad(), ablate(model, order[:count], how, batches=batches if how == MEAN else None):
            losses = [float(loss(model, batch)) for batch in batches]
        points.append(PruningPoint(count, tuple(order[before:count]), sum(losses) / len(losses)))
        before = count
    return tuple(points)


def _order(ranking: Any) -> list[tuple[int, int]]:
    if not isinstance(ranking, Tensor):
        return [(int(layer), int(head)) for layer, head in ranking]
    if ranking.dim() != 2:
        raise ValueError(f"ranking: expected (layers, heads), got shape {tuple(ranking.shape)}")
    numbered = [(value, layer, head) for layer, row in enumerate(ranking.tolist()) for head, value in enumerate(row)]
    return [(layer, head) for value, layer, head in sorted(entry for entry in numbered if entry[0] == entry[0])]


def _replacing(numbers: Sequence[int], means: Tensor | None) -> Edit:
    """An edit that puts the means (H, V), or 0, in the place of these heads."""

    def edit(heads: Tensor) -> Tensor:
        places = torch.tensor(numbers, device=heads.device)
        if means is None:
            return heads.index_fill(-2, places, 0)
        dropped = torch.zeros(heads.shape[-2], 1, dtype=torch.bool, device=heads.device)
        dropped[places] = True
        return torch.where(dropped, means.to(heads), heads)

    return edit


def _means(
    model: nn.Module, chosen: Mapping[AttentionBlock, Sequence[int]], batches: Iterable[Any]
) -> dict[AttentionBlock, Tensor]:
    """(H, V) float64 means over all tokens."""
    sums: dict[AttentionBlock, Tensor] = {}
    counts: dict[AttentionBlock, int] = dict.fromkeys(chosen, 0)
    batch: Any = None

    def adding(block: AttentionBlock) -> Edit:
        def edit(heads: Tensor) -> Tensor:
            mask = token_mask(batch, heads)
            rows = heads.flatten(0, -3) if mask is None else heads[mask]
            sums[block] = sums.get(block, 0) + rows.detach().double().sum(0)
            counts[block] += len(rows)
            return heads

        return edit

    with ExitStack() as undo, torch.no_grad():
        for block in chosen:
            block.edit_heads(undo, adding(block))
        for one in each(batches):
            batch = one
            run(model, one)
    silent = [block.name for block in chosen if not counts[block]]
    if silent:
        raise ValueError(f"batches: expected tokens for {silent[0]}, which saw none")
    return {block: sums[block] / counts[block] for block in chosen}
