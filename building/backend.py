"""setuptools' build backend, with a requirement that depends on the machine: see `building.nvcc.requirements`."""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

from building import nvcc


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What a wheel is built with."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *nvcc.requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """What an editable install is built with."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *nvcc.requirements()]
