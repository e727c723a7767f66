"""`make sanitize` runs the kernel tests on a build with sanitizers; this says that it was that build."""

from __future__ import annotations

import os

import pytest


def test_the_sanitized_build_is_the_one_under_test() -> None:
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("only under `make sanitize`")
    from attncap import _C

    with open(_C.__file__, "rb") as library:
        assert b"__asan_init" in library.read()
