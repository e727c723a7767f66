"""How alike heads attend: Jensen-Shannon distances without maps, groups of heads, and heads as points in the plane.

After Clark et al. 2019 (What Does BERT Look At?, section 6). Rows are taken a few at a time, all heads at once, so
memory grows with the number of keys and not with its square.

B sequences   H heads of all layers together   Q query rows   K keys   R rows of one tile
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attncap.adapters.served import ServedCall
from attncap.analysis.batches import each, run
from attncap.analysis.row_blocks import row_block, rows_at_once
from attncap.capture import Capture
from attncap.types import HeadStats, StatSpec


@dataclass(frozen=True)
class HeadDistances:
    """Distances between heads.

    Attributes:
        heads: (module, head) of each row and column.
        total: (H, H) float64, nats: Jensen-Shannon divergences summed over all rows, as Clark et al. have it; what is
            on the diagonal is 0.
        rows: how many rows the sum is over; a mean is at most log 2.
    """

    heads: tuple[tuple[str, int], ...]
    total: Tensor
    rows: int

    @property
    def mean(self) -> Tensor:
        """(H, H) nats per row, from 0 to log 2."""
        return self.total / self.rows


def head_distances(
    model: nn.Module, batches: Iterable[Any], *, layers: Sequence[str | int] | None = None, smoothing: float = 0.0
) -> HeadDistances:
    """Jensen-Shannon divergence between every two heads, of the same rows::

        JS(p, q) = H((p + q) / 2) - H(p) / 2 - H(q) / 2    summed over rows, nats

    The probabilities are made again from queries and keys, R rows of all heads at a time. What goes to a learned sink
    logit is one more outcome.

    Args:
        model: what `capture` serves; run under no_grad.
        batches: each a mapping of keyword arguments or the only argument; padding is left out.
        layers: names or indices of attention modules, as in `capture`; all by default. They must see the same tokens.
        smoothing: s in q = (1 - s) p + s / n, with n the number of keys of the sequence that are no padding; Clark et
            al.'s code has 0.001, so that a divergence by logarithms of ratios is finite. It is finite here without.

    Returns:
        A `HeadDistances`, heads in the order of their layers.

    Raises:
        ValueError: `smoothing` is not from 0 to 1, no rows were seen, layers have different rows or keys.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a number from 0 to 1, got {smoothing}")
    calls: dict[str, tuple[ServedCall, Tensor]] = {}

    def watch(name: str, call: ServedCall, _out: Tensor, stats: HeadStats) -> None:
        again = sum(known.partition("#")[0] == name for known in calls)  # ALBERT has one module for all its layers
        calls[f"{name}#{again}" if again else name] = (call, (stats.lse > -torch.inf).all(1))

    heads: tuple[tuple[str, int], ...] = ()
    total, rows = torch.zeros(()), 0
    with torch.no_grad(), Capture(model, StatSpec.none(), layers=layers, watch=watch):
        for batch in each(batches):
            calls.clear()
            run(model, batch)
            found = tuple((name, head) for name, (call, _) in calls.items() for head in range(call.query.shape[1]))
            if not found:
                raise ValueError("layers: expected some that run, got none")
            if heads and found != heads:
                raise ValueError("batches: expected the same attention modules to run in each, got others")
            heads = found
            summed, counted = _summed(calls, smoothing)
            total, rows = total + summed, rows + counted
    if not rows:
        raise ValueError("batches: expected some with rows that count, got none")
    return HeadDistances(heads, total, rows)


def clusters(distances: Tensor, number: int) -> Tensor:
    """Groups of heads by average linkage: the two groups with the smallest mean distance become one, and so on.

    Args:
        distances: (H, H), symmetric. number: of groups in the end.

    Returns:
        (H,) int64, the number of each head's group, numbered in the order of their first heads.

    Raises:
        ValueError: not a square, not finite, or `number` is not from 1 to H.
    """
    size = len(_square(distances))
    if not 1 <= number <= size:
        raise ValueError(f"number: expected from 1 to {size}, got {number}")
    between = distances.detach().double().cpu().clone().fill_diagonal_(torch.inf)
    sizes = torch.ones(size, dtype=torch.float64)
    group = torch.arange(size)
    for _ in range(size - number):
        first, second = sorted(divmod(int(between.argmin()), size))
        # The mean over pairs of a group of both is the mean of the two means, weighted by their sizes.
        joined = (sizes[first] * between[first] + sizes[second] * between[second]) / (sizes[first] + sizes[second])
        joined[first] = torch.inf
        between[first], between[:, first] = joined, joined
        between[second], between[:, second] = torch.inf, torch.inf
        sizes[first] += sizes[second]
        group[group == second] = first
    numbers: Tensor = torch.unique(group, return_inverse=True)[1]
    return numbers


def coordinates(distances: Tensor, dimensions: int = 2) -> Tensor:
    """Heads as points whose distances are about those given: classical multidimensional scaling (Torgerson 1952).

    The eigenvectors of -1/2 J D^2 J with the largest eigenvalues, J taking off means, times their roots. Of each the
    entry that is largest in size is positive, so that the same distances give the same picture.

    Args:
        distances: (H, H), symmetric; square roots of Jensen-Shannon divergences are distances in the strict sense.

    Returns:
        (H, dimensions) float64; a dimension without anything to show is 0.

    Raises:
        ValueError: not a square, not finite, or `dimensions` is not from 1 to H.
    """
    size = len(_square(distances))
    if not 1 <= dimensions <= size:
        raise ValueError(f"dimensions: expected from 1 to {size}, got {dimensions}")
    squares = distances.detach().double().cpu() ** 2
    centred = squares - squares.mean(0) - squares.mean(1, keepdim=True) + squares.mean()
    values, vectors = torch.linalg.eigh(-centred / 2)
    values, vectors = values.flip(0)[:dimensions], vectors.flip(1)[:, :dimensions]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    points: Tensor = vectors * torch.sign(largest) * values.clamp_min(0).sqrt()
    return points


def _square(distances: Any) -> Tensor:
    if not isinstance(distances, Tensor):
        raise TypeError(f"distances: expected a tensor, got {type(distances).__name__}")
    if distances.dim() != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"distances: expected (heads, heads), got {tuple(distances.shape)}")
    if not distances.isfinite().all():
        raise ValueError("distances: expected finite numbers")
    return distances


def _summed(calls: dict[str, tuple[ServedCall, Tensor]], smoothing: float) -> tuple[Tensor, int]:
    """(sum of the divergences (H, H) float64, how many rows it is over) of one forward."""
    sizes = {name: (call.query.shape[0], call.query.shape[2], call.key.shape[2]) for name, (call, _) in calls.items()}
    first, (batch, rows, keys) = next(iter(sizes.items()))
    for name, size in sizes.items():
        if size != (batch, rows, keys):
            raise ValueError(
                f"layers: {name} has (sequences, rows, keys) {size} and {first} {(batch, rows, keys)}; heads can be "
                "compared where they are the same"
            )
    number = sum(call.query.shape[1] for call, _ in calls.values())
    tile = rows_at_once(number, keys)
    total, count = torch.zeros(number, number, dtype=torch.float64), 0
    for sequence in range(batch):
        counted = torch.stack([seen[sequence] for _, seen in calls.values()]).all(0)
        for start in range(0, rows, tile):
            kept = counted[start : start + tile]
            if not kept.any():
                continue
            parts = [_rows(call, sequence, start, tile, smoothing)[:, kept] for call, _ in calls.values()]
            total += _divergences(torch.cat(parts))
            count += int(kept.sum())
    return total, count


def _rows(call: ServedCall, sequence: int, start: int, tile: int, smoothing: float) -> Tensor:
    """(H, R, K + 1) float64 of one sequence's rows, the null outcome last."""
    prob, null = row_block(call, sequence, start, start + tile)
    if smoothing:
        tokens = torch.ones_like(prob[0, 0], dtype=torch.bool) if call.key_mask is None else call.key_mask[sequence]
        prob = (1 - smoothing) * prob + smoothing * tokens.to(prob) / tokens.sum()
    other = torch.zeros_like(prob[..., :1]) if null is None else (1 - smoothing) * null[..., None]
    return torch.cat([prob, other], -1)


def _divergences(prob: Tensor) -> Tensor:
    """(H, H) of (H, R, K): the sum over rows."""
    own = -torch.xlogy(prob, prob).sum((-2, -1))  # (H,)
    total = torch.zeros(len(prob), len(prob), dtype=torch.float64)
    for head in range(len(prob) - 1):
        middle = (prob[head] + prob[head + 1 :]) / 2
        both = -torch.xlogy(middle, middle).sum((-2, -1))
        total[head, head + 1 :] = (both - (own[head] + own[head + 1 :]) / 2).clamp_min(0).cpu()
    return total + total.T
