"""attncap: attention, and what every head does with it, in one pass and O(N) memory."""

from __future__ import annotations

from attncap import nn as nn  # not in __all__: a star import is not to hide torch's
from attncap import tags
from attncap import threads as threads  # learns of every fork from here on
from attncap.api import attention, attention_varlen
from attncap.capture import Capture, capture
from attncap.dispatch import available_impls, last_impl
from attncap.monitor import Alarm, AlarmError, AlarmWarning, Monitor
from attncap.sdpa import scaled_dot_product_attention
from attncap.types import AttncapError, HeadStats, MissingExtraError, StatSpec, UnsupportedError

__version__ = "0.1.0"

__all__ = [
    "Alarm",
    "AlarmError",
    "AlarmWarning",
    "AttncapError",
    "Capture",
    "HeadStats",
    "MissingExtraError",
    "Monitor",
    "StatSpec",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_varlen",
    "available_impls",
    "capture",
    "last_impl",
    "scaled_dot_product_attention",
    "tags",
]
