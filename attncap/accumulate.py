"""Streams per-row statistics into summaries per (module, statistic, group, head).

The result does not depend, in any bit, on the batch size, on right padding or on the number of threads, given the
same per-row values: each sequence is reduced by itself with additions whose order depends on the absolute row index
alone, and the sequences are merged one after another in their order.

    S statistics   B sequences   H heads   N rows (queries, or keys for per-key statistics)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attncap import histogram, row_sums, row_sums_cpu
from attncap.moments import Moments, RowValues, Sequences, fold, merge
from attncap.types import STATISTIC_NAMES, HeadStats, StatSpec

ALL_GROUP = "all"
QUANTILES = (0.05, 0.5, 0.95)
FIELDS = ("count", "mean", "std", "min", "max", "p05", "p50", "p95", "nonfinite")

# Statistics of rows that HeadStats derives from its fields, or that are derived here.
_DERIVED = ("max_prob", "topk_mass", "relative_entropy")
# Statistics that are never negative have no negative bins; names not listed here (tags, features) may be anything.
_NONNEGATIVE = frozenset((*STATISTIC_NAMES, *_DERIVED)) - {"lse", "max_logit", "feature_mass"}
_KNOWN_ORDER = {name: place for place, name in enumerate((*STATISTIC_NAMES, *_DERIVED))}


@dataclass(frozen=True)
class HeadRow:
    """One line of heads.parquet. NaN where nothing was counted, and p05..p95 without a histogram."""

    layer: int
    module: str
    head: int
    stat: str
    group: str
    count: int
    mean: float
    std: float  # of the population
    min: float
    max: float
    p05: float
    p50: float
    p95: float


@dataclass(frozen=True)
class Heads:
    """Some heads of a module: their numbers, and how many it has in all."""

    numbers: tuple[int, ...]
    total: int


Observer = Callable[[str, Mapping[str, Tensor], dict[str, Tensor], Heads], None]
"""Told of (module, values, rows that count per statistic, heads) as they are given to `Accumulator.add`."""


class Accumulator:
    """Count, mean, M2, min, max and (optionally) a histogram of every statistic of every head.

    Counts are int64, everything else float64. `add` never waits for the device of the values; reading does.

    Args:
        histogram: keep a histogram of each (module, statistic, group, head), from which p05, p50 and p95 are read;
            their error is at most 1/64 of the value, or 2^-16 (see `attncap.histogram.quantiles`). It takes 16 KiB
            per head and statistic, 32 KiB for statistics that can be negative.
    """

    def __init__(self, histogram: bool = False) -> None:
        self.histogram = histogram
        self.observer: Observer | None = None  # told of everything that is added
        self._moments: dict[str, dict[str, dict[str, Moments]]] = {}  # module -> group -> statistic
        self._heads: dict[str, int] = {}

    def add(
        self,
        module: str,
        values: Mapping[str, Tensor],
        counted: Mapping[str, Tensor] | Tensor,
        groups: Sequence[str] | None = None,
        *,
        heads: Heads | None = None,
    ) -> None:
        """Count the rows of one call.

        Args:
            module: name of the module the statistics belong to.
            values: statistic name -> (B, H, N) floating; N may differ between statistics.
            counted: bool, broadcastable to (B, H, N): rows that count; one for all statistics or one per statistic.
                Rows whose value is not finite are left out of that statistic and counted in `nonfinite`.
            groups: name of the group of each of the B sequences; "all" when None.
            heads: which heads of the module these H are; None where it has no others.

        Raises:
            ValueError: shapes do not fit together, or the module had another number of heads before.
        """
        if not values:
            return
        batch, given = _check_values(module, values)
        heads = Heads(tuple(range(given)), given) if heads is None else heads
        if len(heads.numbers) != given:
            raise ValueError(f"heads: expected {given} numbers for {module}, got {len(heads.numbers)}")
        if batch == 0:
            return
        if groups is not None and len(groups) != batch:
            raise ValueError(f"groups: expected {batch} names, one per sequence, got {len(groups)}")
        if self._heads.setdefault(module, heads.total) != heads.total:
            raise ValueError(f"values: {module} had {self._heads[module]} heads before, got {heads.total}")
        if not heads.numbers:
            return
        if self.observer is not None:
            by_name = dict.fromkeys(values, counted) if isinstance(counted, Tensor) else dict(counted)
            self.observer(module, values, by_name, heads)
        members = _members(groups)
        by_length: dict[int, list[str]] = {}
        for name, value in values.items():
            by_length.setdefault(value.shape[-1], []).append(name)
        # Running sums must outlive a user's inference_mode block, where in-place updates would be refused later.
        with torch.inference_mode(False), torch.no_grad():
            for names in by_length.values():
                self._add_length(module, names, values, counted, members, heads)

    def expect(self, module: str, heads: int) -> None:
        """Give a module its row in tables before anything of it is counted.

        Raises:
            ValueError: the module had another number of heads before.
        """
        if self._heads.setdefault(module, heads) != heads:
            raise ValueError(f"heads: {module} had {self._heads[module]} heads before, got {heads}")
        self._moments.setdefault(module, {})

    def _add_length(
        self,
        module: str,
        names: list[str],
        values: Mapping[str, Tensor],
        counted: Mapping[str, Tensor] | Tensor,
        members: Mapping[str, list[int] | None],
        heads: Heads,
    ) -> None:
        """Add statistics of one length."""
        like = values[names[0]]
        expanded: dict[int, Tensor] = {}  # most statistics count the same rows
        rows = []
        for name in names:
            mine = counted if isinstance(counted, Tensor) else counted[name]
            if id(mine) not in expanded:
                expanded[id(mine)] = mine.expand(like.shape)
            states = {group: self._state(module, group, name, like) for group in members}
            rows.append(RowValues(values[name], expanded[id(mine)], states, name not in _NONNEGATIVE))
        (row_sums_cpu if row_sums_cpu.serves(rows) else row_sums).add(rows, members, heads.numbers)

    def _state(self, module: str, group: str, name: str, like: Tensor) -> Moments:
        by_name = self._moments.setdefault(module, {}).setdefault(group, {})
        if name not in by_name:
            bins = histogram.bin_count(name not in _NONNEGATIVE) if self.histogram else 0
            by_name[name] = Moments.empty(self._heads[module], like.device, bins)
        return by_name[name]

    def merge(self, other: Accumulator) -> None:
        """Add what `other` counted, as if its sequences came after this one's (up to rounding). `other` is kept.

        Raises:
            ValueError: only one of them has histograms, or a module's number of heads differs.
        """
        if self.histogram != other.histogram:
            raise ValueError(f"other: expected histogram={self.histogram} as here, got {other.histogram}")
        with torch.inference_mode(False), torch.no_grad():
            for module, groups in other._moments.items():
                heads = other._heads[module]
                if self._heads.setdefault(module, heads) != heads:
                    raise ValueError(f"other: {module} has {self._heads[module]} heads here, got {heads}")
                for group, by_name in groups.items():
                    for name, theirs in by_name.items():
                        mine = self._state(module, group, name, theirs.count)
                        device = mine.count.device
                        numbers = (theirs.count, theirs.nonfinite, theirs.mean, theirs.m2, theirs.low, theirs.high)
                        merge([mine], Sequences(*(number.to(device)[None, None] for number in numbers)))
                        if mine.bins is not None and theirs.bins is not None:
                            mine.replace(bins=mine.bins + theirs.bins.to(device))

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules, in order of first execution."""
        return tuple(self._moments)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads of each module."""
        return tuple(self._heads[module] for module in self._moments)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, sorted."""
        return tuple(sorted({group for groups in self._moments.values() for group in groups}))

    @property
    def stats(self) -> tuple[str, ...]:
        """Names of the statistics: those of HeadStats first, then tags and features by name."""
        found = {name for groups in self._moments.values() for by_name in groups.values() for name in by_name}
        return tuple(canonical_order(found))

    def table(self, stat: str, field: str = "mean", group: str = ALL_GROUP) -> Tensor:
        """One number per (layer, head), layers in order of first execution.

        Args:
            stat: name of the statistic. group: name of the group.
            field: count, nonfinite, mean, std (of the population), min, max, p05, p50 or p95.

        Returns:
            (layers, heads) float64 on the CPU, NaN where nothing was counted and where a layer has fewer heads than
            another; int64 with 0 there for count and nonfinite.

        Raises:
            ValueError: there is no such statistic, group or field, or quantiles without a histogram.
        """
        self._check_names(stat, field, group)
        whole = field in ("count", "nonfinite")
        result = torch.zeros(len(self.modules), max(self.heads, default=0), dtype=torch.int64)
        if not whole:
            result = torch.full(result.shape, torch.nan, dtype=torch.float64)
        for layer, module in enumerate(self._moments):
            moments = self._moments[module].get(group, {}).get(stat)
            if moments is not None:
                result[layer, : self._heads[module]] = torch.from_numpy(_columns(stat, moments)[field])
        return result

    def _check_names(self, stat: str, field: str, group: str) -> None:
        for name, value, known in (("stat", stat, self.stats), ("group", group, self.groups), ("field", field, FIELDS)):
            if value not in known:
                expected = ", ".join(known) or "(nothing was captured yet)"
                raise ValueError(f"{name}: expected one of {expected}, got {value!r}")
        if field in ("p05", "p50", "p95") and not self.histogram:
            raise ValueError(f"field: {field} needs Accumulator(histogram=True)")

    def nonfinite_rows(self) -> int:
        """Rows left out because they were not finite, each once per head, of the statistic that lost most of them."""
        lost: dict[str, int] = {}
        for groups in self._moments.values():
            for by_name in groups.values():
                for stat, moments in by_name.items():
                    lost[stat] = lost.get(stat, 0) + int(moments.nonfinite.sum())
        return max(lost.values(), default=0)

    def rows(self) -> Iterator[HeadRow]:
        """The lines of heads.parquet: by layer, statistic, group (sorted) and head."""
        for layer, (module, groups) in enumerate(self._moments.items()):
            for stat in canonical_order({name for by_name in groups.values() for name in by_name}):
                for group in sorted(groups):
                    if stat not in groups[group]:
                        continue
                    columns = _columns(stat, groups[group][stat])
                    numbers = [columns[field].tolist() for field in FIELDS[:-1]]
                    for head, line in enumerate(zip(*numbers, strict=True)):
                        yield HeadRow(layer, module, head, stat, group, *line)

    def to_bytes(self) -> bytes:
        """Everything, in a form that `from_bytes` reads; equal contents give equal bytes."""
        from attncap import accumulate_io

        return accumulate_io.dump(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Accumulator:
        """What `to_bytes` wrote, on the CPU.

        Raises:
            ValueError: `data` is damaged or is something else.
        """
        from attncap import accumulate_io

        return accumulate_io.load(data)


def canonical_order(names: set[str]) -> list[str]:
    """Statistics in the order of HeadStats, then the rest by name."""
    return sorted(names, key=lambda name: (_KNOWN_ORDER.get(name, len(_KNOWN_ORDER)), name))


def _check_values(module: str, values: Mapping[str, Tensor]) -> tuple[int, int]:
    batch, heads = next(iter(values.values())).shape[:2]
    for name, value in values.items():
        if value.dim() != 3 or value.shape[:2] != (batch, heads):
            raise ValueError(
                f"values[{name!r}]: expected shape ({batch}, {heads}, rows) for {module}, got {tuple(value.shape)}"
            )
    return batch, heads


def _members(groups: Sequence[str] | None) -> Mapping[str, list[int] | None]:
    """Group -> the places of its sequences in the batch, None standing for all of them."""
    if groups is None:
        return {ALL_GROUP: None}
    members: dict[str, list[int] | None] = {}
    for group in dict.fromkeys(groups):
        places = [place for place, name in enumerate(groups) if name == group]
        members[group] = None if len(places) == len(groups) else places
    return members


def _columns(stat: str, moments: Moments) -> dict[str, NDArray[Any]]:
    """FIELDS -> (H,) numpy array."""
    count = moments.count.cpu().numpy()
    none = count == 0
    low, high = moments.low.cpu().numpy(), moments.high.cpu().numpy()
    columns = {"count": count, "nonfinite": moments.nonfinite.cpu().numpy()}
    columns["mean"] = np.where(none, np.nan, moments.mean.cpu().numpy())
    columns["std"] = np.where(none, np.nan, np.sqrt(moments.m2.cpu().numpy() / np.maximum(count, 1)))
    columns["min"], columns["max"] = np.where(none, np.nan, low), np.where(none, np.nan, high)
    if moments.bins is None:
        found = np.full((len(count), len(QUANTILES)), np.nan)
    else:
        found = histogram.quantiles(moments.bins.cpu().numpy(), low, high, QUANTILES, stat not in _NONNEGATIVE)
    columns["p05"], columns["p50"], columns["p95"] = found.T
    return columns


def row_values(
    stats: HeadStats,
    spec: StatSpec,
    *,
    tag_names: Sequence[str] = (),
    feature_names: Sequence[str] = (),
    seen_keys: Tensor | None = None,
) -> dict[str, Tensor]:
    """Per-row numbers of one call under their names in heads.parquet.

    Args:
        stats: statistics of a call of `attncap.attention`. spec: what they were asked for with.
        tag_names: one name per tag. feature_names: one name per feature column.
        seen_keys: integers, broadcastable to (B, H, Q): keys that each row sees; for ``relative_entropy`` =
            entropy / log(seen keys), which needs at least two (see `counted_rows`). None leaves it out.

    Returns:
        name -> (B, H, Q), and ``received_mass`` (B, H, K): the three-dimensional statistics of HeadStats as they are,
        ``topk_mass``, ``offset_mass[-1]`` etc., each tag and feature under its own name, ``max_prob``,
        ``relative_entropy``.
    """
    values = {name: tensor for name, tensor in stats.items() if tensor.dim() == 3}
    max_prob = stats.max_prob
    if max_prob is not None:
        values["max_prob"] = max_prob
    if stats.topk_prob is not None:
        values["topk_mass"] = fold(stats.topk_prob)
    offset_names = [f"offset_mass[{offset}]" for offset in spec.offsets]
    named = ((stats.offset_mass, offset_names), (stats.tag_mass, tag_names), (stats.feature_mass, feature_names))
    for masses, names in named:
        if masses is not None:
            values |= dict(zip(names, masses.unbind(-1), strict=True))
    if stats.entropy is not None and seen_keys is not None:
        log_keys = seen_keys.clamp_min(2).to(torch.float64).log()
        values["relative_entropy"] = (stats.entropy / log_keys).to(stats.entropy.dtype)
    return values


def counted_rows(
    values: Mapping[str, Tensor], stats: HeadStats, *, seen_keys: Tensor | None = None, key_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Which rows of `row_values` count, name -> bool broadcastable to the values.

    A query row counts when it is not padding and sees a key: `attncap.attention` gives every other row lse = -inf.
    For ``relative_entropy`` it must see two keys. ``received_mass`` counts the keys that are not padding.

    Args:
        seen_keys: as in `row_values`. key_mask: (B, K) bool, False for padding keys; None counts them all.
    """
    rows = stats.lse != -torch.inf  # a NaN counts here, and then as non-finite
    # A row that sees nothing but NaN may have lse = -inf; the other statistics of an empty row are 0 or -inf.
    witness = next((tensor for tensor in (stats.entropy, stats.max_logit, stats.sink_mass) if tensor is not None), None)
    if witness is not None:
        rows |= witness.isnan()
    counted = dict.fromkeys(values, rows)
    if "relative_entropy" in values and seen_keys is not None:
        counted["relative_entropy"] = rows & (seen_keys >= 2)
    if stats.received_mass is not None:
        every = torch.ones_like(stats.received_mass, dtype=torch.bool)
        counted["received_mass"] = every if key_mask is None else every & key_mask[:, None, :]
    return counted
