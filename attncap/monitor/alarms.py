"""Alarms of a `Monitor`: which head passed which threshold, and what is done about it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attncap.types import AttncapError

BELOW, ABOVE, NONFINITE, SILENT = "below", "above", "nonfinite", "silent"

_SHOWN = 8  # alarms that a message lists


@dataclass(frozen=True)
class Alarm:
    """One head beyond a threshold, or one step in which nothing was captured."""

    kind: str  # "below", "above", "nonfinite" or "silent"
    step: int  # how many steps had ended
    stat: str = ""
    layer: str = ""  # name of the module
    head: int = -1
    value: float = float("nan")  # of the statistic; of "nonfinite" how many rows were not finite
    threshold: float = float("nan")

    def __str__(self) -> str:
        if self.kind == SILENT:
            return (
                f"step {self.step} ended without a captured attention call, although it was one to capture: the model "
                "did not run, not in training mode (see `evaluation`), or was run by another object than the one "
                "that is monitored"
            )
        where = f"{self.layer} head {self.head}: {self.stat}"
        if self.kind == NONFINITE:
            return f"{where} is not finite in {self.value:.0f} rows (threshold {self.threshold:.0f})"
        return f"{where} is {self.value:.6g}, {self.kind} {self.threshold:.6g}"


class AlarmWarning(UserWarning):
    """Alarms of a monitor that was not asked to do anything else about them."""


class AlarmError(AttncapError, RuntimeError):
    """Alarms of a monitor with on_alarm="raise"; they are in `alarms`."""

    def __init__(self, message: str, alarms: Sequence[Alarm]) -> None:
        super().__init__(message)
        self.alarms = list(alarms)


OnAlarm = str | Callable[[Alarm], None]


class Alarms:
    """Thresholds, and what is done where one is passed.

    Args:
        below, above: statistic -> threshold.
        on_alarm: "warn", "raise", or a function that is called with every `Alarm`; what it raises is raised.
    """

    def __init__(self, below: Mapping[str, float] | None, above: Mapping[str, float] | None, on_alarm: OnAlarm) -> None:
        self._thresholds = {BELOW: _checked(BELOW, below), ABOVE: _checked(ABOVE, above)}
        if on_alarm not in ("warn", "raise") and not callable(on_alarm):
            raise ValueError(f'on_alarm: expected "warn", "raise" or a function of an Alarm, got {on_alarm!r}')
        self._on_alarm = on_alarm

    def in_tables(
        self, layers: Sequence[str], tables: Mapping[str, Tensor], nonfinite: Mapping[str, Tensor], step: int
    ) -> list[Alarm]:
        """What passed a threshold.

        Args:
            tables: statistic -> (layers, heads), NaN where nothing was counted.
            nonfinite: statistic -> (layers, heads), rows that were not finite; each head is named once, with the
                statistic that lost most of them.

        Raises:
            ValueError: a threshold is of a statistic that is not there, so it would never be passed.
        """
        found = []
        for kind, thresholds in self._thresholds.items():
            for stat, threshold in thresholds.items():
                if stat not in tables:
                    raise ValueError(f"{kind}: expected statistics among {', '.join(tables)}, got {stat!r}")
                table = tables[stat]
                beyond = table < threshold if kind == BELOW else table > threshold
                for layer, head in beyond.nonzero().tolist():
                    value = float(table[layer, head])
                    found.append(Alarm(kind, step, stat, layers[layer], head, value, threshold))
        lost: dict[tuple[int, int], Alarm] = {}
        for stat, rows in nonfinite.items():
            for layer, head in rows.nonzero().tolist():
                alarm = Alarm(NONFINITE, step, stat, layers[layer], head, float(rows[layer, head]), 0.0)
                if (layer, head) not in lost or lost[layer, head].value < alarm.value:
                    lost[layer, head] = alarm
        return [*lost.values(), *found]

    def give(self, alarms: Sequence[Alarm], *, warns: bool = True) -> None:
        """Do what is to be done about them.

        Args:
            warns: False on processes that leave the warning to another.
        """
        if not alarms:
            return
        if callable(self._on_alarm):
            for alarm in alarms:
                self._on_alarm(alarm)
            return
        shown = "; ".join(str(alarm) for alarm in alarms[:_SHOWN])
        more = f"; and {len(alarms) - _SHOWN} more" if len(alarms) > _SHOWN else ""
        message = f"attention at step {alarms[0].step}: {shown}{more}"
        if self._on_alarm == "raise":
            raise AlarmError(message, alarms)
        if warns:
            warnings.warn(message, AlarmWarning, stacklevel=3)


def _checked(name: str, thresholds: Any) -> dict[str, float]:
    if thresholds is None:
        return {}
    if not isinstance(thresholds, Mapping):
        raise TypeError(f"{name}: expected a mapping of statistics to numbers, got {type(thresholds).__name__}")
    for stat, threshold in thresholds.items():
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"{name}[{stat!r}]: expected a number, got {threshold!r}")
        if math.isnan(threshold):
            raise ValueError(f"{name}[{stat!r}]: expected a number, got one that is never passed, {threshold}")
    return {stat: float(threshold) for stat, threshold in thresholds.items()}
