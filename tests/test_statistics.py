"""The accumulators that host and device compile (csrc/statistics), checked on the host by a program of tests/native."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import programs

GROUPS = ["rows", "parts", "no_keys", "caps", "order", "best", "lists"]


def build_and_run(program: Path) -> str:
    programs.build("statistics.cpp", program)
    return programs.run(program)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the program prints, by group."""
    return programs.outcomes(programs.shared_folder(tmp_path_factory), "statistics", build_and_run)


@pytest.mark.parametrize("group", GROUPS)
def test_the_accumulators_hold(group: str, report: dict[str, str]) -> None:
    assert report.get(group, "not reached").startswith("ok ")


def test_every_group_of_checks_is_looked_at(report: dict[str, str]) -> None:
    assert sorted(report) == sorted(GROUPS)
