"""What `capture(..., keep=...)` keeps of single calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attncap.types import HeadStats

KEEP = ("summary", "last", "all")


class KeptStats(Mapping[str, Any]):
    """HeadStats by module name, as far as `keep` asks for them."""

    def __init__(self, keep: str) -> None:
        self._keep = keep
        self._kept: dict[str, Any] = {}

    def keep(self, module: str, stats: HeadStats) -> None:
        """Take the statistics of one call."""
        if self._keep == "last":
            self._kept[module] = stats
        elif self._keep == "all":
            self._kept.setdefault(module, []).append(stats)

    def __getitem__(self, module: str) -> Any:
        if self._keep == "summary":
            raise ValueError(
                'stats: keep="summary" keeps no statistics of single calls; capture with keep="last" or keep="all"'
            )
        if module not in self._kept:
            raise KeyError(f"{module!r} was not captured; captured: {', '.join(self._kept) or 'nothing yet'}")
        return self._kept[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
