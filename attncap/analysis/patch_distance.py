"""How far apart in the image a vision transformer's heads look.

H heads   N tokens   R rows of one block
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attncap.adapters.served import ServedCall
from attncap.analysis.batches import each, run
from attncap.analysis.blocks import by_layer_and_head
from attncap.analysis.row_blocks import row_block, rows_at_once
from attncap.capture import Capture
from attncap.types import HeadStats, StatSpec


def patch_distance(
    model: nn.Module, batches: Iterable[Any], patch: float, *, grid: tuple[int, int] | None = None, others: int = 1
) -> Tensor:
    """Mean attention distance in the plane (Dosovitskiy et al. 2021, figure 7; Raghu et al. 2021)::

        mean over patches i of sum_j p_ij * patch * |(row_i, column_i) - (row_j, column_j)|

    over patches j alone: what goes to other tokens has no distance and is not redistributed, as in `distance`.

    A root of squares is no sum of one feature per key, so rows of the map are made a few at a time
    (`attncap.analysis.row_blocks`). The mean of *squared* distances is one: with key features x, y and x² + y² it is
    x_i² + y_i² - 2 x_i <x> - 2 y_i <y> + <x² + y²>.

    Args:
        model: what `capture` serves; run under no_grad.
        batches: each a mapping of keyword arguments or the only argument.
        patch: the side of a patch: pixels, for a distance in pixels; 1 for one in patches.
        grid: rows and columns of patches; None for a square.
        others: how many tokens before the patches are none (the class token, registers).

    Returns:
        (layers, heads) float64, in the unit of `patch`; NaN where a layer has fewer heads.

    Raises:
        ValueError: the tokens are not `others` and a grid; no batches.
    """
    sums: dict[str, tuple[Tensor, int]] = {}

    def watch(name: str, call: ServedCall, _out: Tensor, _stats: HeadStats) -> None:
        if call.crosses:
            return
        place = _places(call.key.shape[2], grid, others).to(call.query.device) * patch
        total, count = sums.get(name, (torch.zeros((), dtype=torch.float64), 0))
        for sequence in range(len(call.query)):
            total = total + _summed(call, sequence, place, others).cpu()
        sums[name] = total, count + len(call.query) * len(place)

    with torch.no_grad(), Capture(model, StatSpec.none(), watch=watch):
        for batch in each(batches):
            run(model, batch)
    if not sums:
        raise ValueError("batches: expected at least one, got none")
    return by_layer_and_head([total / count for total, count in sums.values()])


def _summed(call: ServedCall, sequence: int, place: Tensor, others: int) -> Tensor:
    """(H,) sum over the rows of one sequence's patches."""
    _, heads, rows, _ = call.query.shape
    step = rows_at_once(heads, rows)
    total = torch.zeros(heads, dtype=torch.float64, device=place.device)
    for start in range(others, rows, step):
        prob_HRN, _ = row_block(call, sequence, start, start + step)
        distance_RN = torch.cdist(place[start - others : start - others + step], place)
        total += (prob_HRN[..., others:] * distance_RN).sum((1, 2))
    return total


def _places(tokens: int, grid: tuple[int, int] | None, others: int) -> Tensor:
    """(patches, 2) float64, in patches."""
    side = math.isqrt(max(tokens - others, 0))
    rows, columns = (side, side) if grid is None else grid
    if rows * columns != tokens - others or rows < 1:
        wanted = "a square of patches" if grid is None else f"{rows} x {columns} patches"
        raise ValueError(f"grid, others: expected {wanted} behind {others} other tokens, got {tokens} tokens")
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
