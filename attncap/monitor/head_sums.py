"""Sums and maxima of statistics over rows, per module and head, in a form that processes can add up.

Lighter than `attncap.accumulate`, which has fixed bits, spreads and histograms: a dozen operations a call, none of
which waits for the device.

S statistics   B sequences   H heads   N rows   L layers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attncap.accumulate import Heads, canonical_order

Entry = tuple[str, tuple[str, ...], int]
"""A module, statistics of it whose rows are equally many, and the number of its heads."""

COUNT, NONFINITE, TOTAL, HIGH = range(4)
_ADDED = 3  # the first so many are added up, of the last one the larger counts


class HeadSums:
    """Per module, statistic and head: rows counted, rows left out because they were not finite, sum and maximum."""

    def __init__(self, numbers: Mapping[Entry, Tensor] | None = None) -> None:
        self._numbers: dict[Entry, Tensor] = dict(numbers or {})  # (S, 4, H) float64 each

    def add(
        self,
        module: str,
        values: Mapping[str, Tensor],
        counted: Mapping[str, Tensor],
        heads: Heads,
        places: Sequence[int] | None = None,
    ) -> None:
        """Count the rows of one call.

        Args:
            values: statistic -> (B, H, N) floating.
            counted: statistic -> bool, broadcastable to (B, H, N): rows that count.
            heads: the numbers, in the whole module, of those heads that count.
            places: of them among the H given ones; None where they are all.
        """
        by_length: dict[int, list[str]] = {}
        for name, value in values.items():
            by_length.setdefault(value.shape[-1], []).append(name)
        with torch.inference_mode(False), torch.no_grad():
            for names in by_length.values():
                packed = torch.stack([values[name] for name in names])
                rows = torch.stack([counted[name].expand_as(values[name]) for name in names])
                found = _among(_summed(packed, rows), heads, places)
                self._join((module, tuple(names), heads.total), found)

    def _join(self, entry: Entry, found: Tensor) -> None:
        before = self._numbers.get(entry)
        self._numbers[entry] = found if before is None else _joined(before.to(found.device), found)

    @property
    def device(self) -> torch.device | None:
        """Where the first numbers are; None where there are none."""
        return next((numbers.device for numbers in self._numbers.values()), None)

    @property
    def layout(self) -> tuple[Entry, ...]:
        """What there are numbers of, in order of first execution."""
        return tuple(self._numbers)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules, in order of first execution."""
        return tuple(dict.fromkeys(module for module, _, _ in self._numbers))

    @property
    def stats(self) -> tuple[str, ...]:
        """Names of the statistics: those of HeadStats first, then tags and features by name."""
        return tuple(canonical_order({name for _, names, _ in self._numbers for name in names}))

    def table(self, stat: str) -> Tensor:
        """(L, 4, H) float64: of every module and head COUNT, NONFINITE, TOTAL and HIGH; blank where it has none."""
        rows: dict[str, Tensor] = {}
        for (module, names, _), numbers in self._numbers.items():
            if stat in names:
                row = numbers[names.index(stat)]
                rows[module] = _joined(rows[module][None], row[None])[0] if module in rows else row
        first = next(iter(rows.values()))
        most = max(heads for _, _, heads in self._numbers)
        blank = _blank(1, most, first.device)[0]
        wide = [rows.get(module, blank) for module in self.modules]
        return torch.stack([torch.cat([row.to(first.device), blank[:, row.shape[-1] :]], dim=-1) for row in wide])

    def packed(self, layout: Sequence[Entry], device: torch.device) -> tuple[Tensor, Tensor]:
        """(what is to be added up, what the larger counts of) in the order of `layout`, flat float64."""
        blocks = [
            self._numbers[entry].to(device) if entry in self._numbers else _blank(len(entry[1]), entry[2], device)
            for entry in layout
        ]
        nothing = torch.empty(0, dtype=torch.float64, device=device)
        added = torch.cat([nothing, *(block[:, :_ADDED].flatten() for block in blocks)])
        return added, torch.cat([nothing, *(block[:, _ADDED:].flatten() for block in blocks)])

    @classmethod
    def unpacked(cls, layout: Sequence[Entry], added: Tensor, highest: Tensor) -> HeadSums:
        """What `packed` gave, put together again."""
        numbers = {}
        for entry in layout:
            size = len(entry[1]) * entry[2]
            sums, added = added[: _ADDED * size], added[_ADDED * size :]
            highs, highest = highest[:size], highest[size:]
            shaped = sums.view(len(entry[1]), _ADDED, entry[2])
            numbers[entry] = torch.cat([shaped, highs.view(-1, 1, entry[2])], dim=1)
        return cls(numbers)

    def state(self) -> list[dict[str, Any]]:
        """Everything, in lists, numbers and tensors on the CPU."""
        return [
            {"module": module, "stats": list(names), "numbers": numbers.cpu()}
            for (module, names, _), numbers in self._numbers.items()
        ]

    @classmethod
    def of_state(cls, state: Sequence[Mapping[str, Any]]) -> HeadSums:
        """What `state` gave."""
        return cls({(one["module"], tuple(one["stats"]), one["numbers"].shape[-1]): one["numbers"] for one in state})


def _summed(values_SBHN: Tensor, rows_SBHN: Tensor) -> Tensor:
    """(S, 4, H) float64 of the rows of one call."""
    finite = values_SBHN.isfinite() & rows_SBHN
    count = finite.sum((1, 3))
    total = values_SBHN.where(finite, 0.0).sum((1, 3), dtype=torch.float64)
    numbers = [count, rows_SBHN.sum((1, 3)) - count, total]
    if values_SBHN.numel():
        high = values_SBHN.where(finite, -torch.inf).amax((1, 3))
    else:
        high = torch.full_like(total, -torch.inf)
    return torch.stack([number.to(torch.float64) for number in (*numbers, high)], dim=1)


def _blank(stats: int, heads: int, device: torch.device) -> Tensor:
    """(S, 4, H) of nothing."""
    blank = torch.zeros(stats, 4, heads, dtype=torch.float64, device=device)
    blank[:, HIGH] = -torch.inf
    return blank


def _joined(one: Tensor, other: Tensor) -> Tensor:
    added = one[:, :_ADDED] + other[:, :_ADDED]
    return torch.cat([added, torch.maximum(one[:, _ADDED:], other[:, _ADDED:])], dim=1)


def _among(found: Tensor, heads: Heads, places: Sequence[int] | None) -> Tensor:
    """(S, 4, heads.total) with the columns of the heads that count where they belong; by slices, as `moments.pick`."""
    if places is None and len(heads.numbers) == heads.total:
        return found
    where = dict(zip(heads.numbers, range(found.shape[-1]) if places is None else places, strict=True))
    blank = _blank(found.shape[0], 1, found.device)[..., 0]
    columns = [found[..., where[number]] if number in where else blank for number in range(heads.total)]
    return torch.stack(columns, dim=-1)
