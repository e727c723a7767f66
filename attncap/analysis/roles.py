"""Which heads have a role that the literature names: previous token, sink, induction, ...

A role is one statistic, a direction and a threshold on a head's mean over all counted rows. The labels describe
where attention goes on this corpus; they do not say what a head is for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

HALF = 0.5
"""Clark et al. 2019 (section 3.1) call a head one of the next or previous token, or of [SEP], when more than half of
its attention goes there on average. The same half is used for the other places a head may look at."""

SINK_THRESHOLD = 0.3
"""Gu et al. 2025. They hold it against each sequence by itself before averaging, here it is the mean of all rows."""

MATCHING_THRESHOLD = 0.3
"""For masses on a few matching tokens (induction, duplicate): a choice of this project. Olsson et al. 2022 give none,
and on natural text many rows have no match at all, which lowers the mean."""

BROAD_THRESHOLD, NARROW_THRESHOLD = 0.9, 0.2
"""Of relative entropy (1 = uniform over the keys seen); a choice of this project."""

_OFFSET = re.compile(r"offset_mass\[(-?\d+)\]")


@dataclass(frozen=True)
class Role:
    """A name for heads whose mean of `stat`, less that of `less`, lies beyond `threshold`.

    Attributes:
        name: what such a head does, "previous token".
        stat: the statistic of heads.parquet it is read from.
        threshold: beyond it a head has the role; None = the role is only a ranking.
        highest: whether large values make the role (else small ones).
        measures: what the mean is of, "attention on the token before".
        source: where the threshold, or the role, comes from.
        less: a statistic that is always part of `stat` and no sign of the role: a tag also matches the token itself.
    """

    name: str
    stat: str
    threshold: float | None
    highest: bool
    measures: str
    source: str
    less: str | None = None

    def holds(self, mean: float) -> bool:
        """Whether a head with this mean has the role."""
        if self.threshold is None:
            return False
        return mean > self.threshold if self.highest else mean < self.threshold

    @property
    def rule(self) -> str:
        """The threshold as it is printed, "> 0.50"; empty where there is none."""
        return "" if self.threshold is None else f"{'>' if self.highest else '<'} {self.threshold:.2f}"

    def shown(self, mean: float) -> str:
        """A mean as it is printed: two digits, a third where it would look like the threshold otherwise."""
        text = f"{mean:.2f}"
        return f"{mean:.3f}" if self.threshold is not None and text == f"{self.threshold:.2f}" else text


@dataclass(frozen=True)
class HeadRole:
    """One head and its mean of a role's statistic."""

    layer: int
    head: int
    module: str
    mean: float
    count: int
    holds: bool

    @property
    def label(self) -> str:
        """As people say it: "layer 0 head 2"."""
        return f"layer {self.layer} head {self.head}"


@dataclass(frozen=True)
class RoleResult:
    """A role and every head that has the statistic, the most telling first."""

    role: Role
    ranked: tuple[HeadRole, ...]

    @property
    def holders(self) -> tuple[HeadRole, ...]:
        """The heads that have the role."""
        return tuple(head for head in self.ranked if head.holds)


def find_roles(
    heads: pyarrow.Table, *, spec: Mapping[str, Any] | None = None, tags: Iterable[str] = ()
) -> tuple[RoleResult, ...]:
    """The roles that the statistics of a run can show, each with its heads from the most telling on.

    Args:
        heads: the table of ``heads.parquet``; several groups are pooled, weighted with their counts.
        spec: the StatSpec of the run as a mapping (``sink``, ``diagonal``, ... change what a statistic means).
        tags: names of the run's tags, each of which is a role.
    """
    means = means_by_stat(heads)
    return tuple(RoleResult(role, _ranked(role, means)) for role in _roles(means, spec or {}, tags))


def _roles(available: Iterable[str], spec: Mapping[str, Any], tags: Iterable[str]) -> list[Role]:
    """The roles whose statistic is there, in the order they are shown."""
    there = set(available)
    roles = [*_offset_roles(there), *_place_roles(spec), *_tag_roles(tags, spec), *_breadth_roles(there)]
    return [role for role in roles if role.stat in there and (role.less is None or role.less in there)]


def _offset_roles(available: set[str]) -> list[Role]:
    found = [int(match[1]) for stat in available if (match := _OFFSET.fullmatch(stat))]
    return [_offset_role(offset) for offset in sorted(found, key=lambda offset: (abs(offset), offset)) if offset]


def _offset_role(offset: int) -> Role:
    names = {-1: ("previous token", "the token before"), 1: ("next token", "the token after")}
    direction = "before" if offset < 0 else "after"
    name, place = names.get(offset, (f"{abs(offset)} tokens {direction}", f"the token {abs(offset)} {direction}"))
    source = "more than half: Clark 2019" if offset in names else "more than half, as for its neighbours"
    return Role(name, f"offset_mass[{offset}]", HALF, True, f"attention on {place}", source)


def _place_roles(spec: Mapping[str, Any]) -> list[Role]:
    roles = []
    if spec.get("diagonal", 0) == 0:
        roles.append(Role("self", "diagonal_mass", HALF, True, "attention on the token itself", "more than half"))
    sink = int(spec.get("sink", 4))
    first = "the first token" if sink == 1 else f"the first {sink} tokens"
    source = "Xiao 2024; threshold of Gu 2025, who apply it per sequence"
    return [*roles, Role("sink", "sink_mass", SINK_THRESHOLD, True, f"attention on {first}", source)]


def _tag_roles(tags: Iterable[str], spec: Mapping[str, Any]) -> list[Role]:
    # In a model that sees ahead every token's successor matches `induction`, and in any model the token itself
    # matches `duplicate` (see attncap.tags): without that part the masses mean what the literature means.
    itself = "diagonal_mass" if spec.get("diagonal", 0) == 0 else None
    known = {
        "induction": Role(
            "induction",
            "induction",
            MATCHING_THRESHOLD,
            True,
            "attention on what followed this token elsewhere",
            "Olsson 2022; the next token left out",
            less="offset_mass[1]",
        ),
        "duplicate": Role(
            "duplicate",
            "duplicate",
            MATCHING_THRESHOLD,
            True,
            "attention on this token's other occurrences",
            "Wang 2023; the token itself left out",
            less=itself,
        ),
        "segment": Role(
            "segment", "segment", HALF, True, "attention on the token's own segment", "Kovaleva 2019's block pattern"
        ),
        "special_tokens": Role(
            "special tokens", "special_tokens", HALF, True, "attention on special tokens", "more than half: Clark 2019"
        ),
    }
    if itself is None:
        known.pop("duplicate")
        tags = [tag for tag in tags if tag != "duplicate"]
    return [
        known.get(tag) or Role(tag, tag, HALF, True, f"attention where the tag {tag} matches", "more than half")
        for tag in tags
    ]


def _breadth_roles(available: set[str]) -> list[Role]:
    if "relative_entropy" not in available:
        measures, source = "entropy in nats", "depends on the length of the texts"
        return [
            Role("broadest", "entropy", None, True, measures, source),
            Role("narrowest", "entropy", None, False, measures, source),
        ]
    source = "entropy over that of uniform attention"
    return [
        Role("broadest", "relative_entropy", BROAD_THRESHOLD, True, "breadth: 1 looks everywhere alike", source),
        Role("narrowest", "relative_entropy", NARROW_THRESHOLD, False, "breadth: 0 looks at one token", source),
    ]


def _ranked(role: Role, means: Mapping[str, Sequence[HeadRole]]) -> tuple[HeadRole, ...]:
    less = {(head.layer, head.head, head.module): head.mean for head in means.get(role.less or "", ())}
    found = []
    for head in means[role.stat]:
        mean = head.mean - less.get((head.layer, head.head, head.module), 0.0)
        found.append(replace(head, mean=mean, holds=role.holds(mean)))
    sign = -1.0 if role.highest else 1.0
    return tuple(sorted(found, key=lambda head: (sign * head.mean, head.layer, head.head)))


def means_by_stat(heads: pyarrow.Table) -> dict[str, list[HeadRole]]:
    """statistic -> mean of each head over all groups; heads that counted nothing are left out."""
    names = ("layer", "module", "head", "stat", "group", "count", "mean")
    rows = zip(*(heads.column(name).to_pylist() for name in names), strict=True)
    sums: dict[tuple[str, int, int, str], tuple[int, float]] = {}
    for layer, module, head, stat, _group, count, mean in rows:
        if not count or mean is None or not math.isfinite(mean):
            continue
        before, total = sums.get((stat, layer, head, module), (0, 0.0))
        sums[stat, layer, head, module] = (before + count, total + count * mean)
    found: dict[str, list[HeadRole]] = {}
    for (stat, layer, head, module), (count, total) in sums.items():
        found.setdefault(stat, []).append(HeadRole(layer, head, module, total / count, count, holds=False))
    return found
