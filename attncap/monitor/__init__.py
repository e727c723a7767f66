"""`Monitor`: statistics of every head while a model is trained, put together over processes, with alarms."""

from __future__ import annotations

from attncap.monitor.alarms import Alarm, AlarmError, AlarmWarning
from attncap.monitor.monitor import Monitor

__all__ = ["Alarm", "AlarmError", "AlarmWarning", "Monitor"]
