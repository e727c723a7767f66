"""What all tests share. Triton's kernels are interpreted, on the CPU; Triton must know before it is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny.CommandHost]:
    """Runs the command in processes of its own."""
    host = tiny.CommandHost(tmp_path_factory.mktemp("host") / "log")
    yield host
    host.close()
