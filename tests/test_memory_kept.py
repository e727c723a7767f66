"""What a scan's forwards free stays with the process until the scan ends."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest
import torch

from attncap.memory import kept_memory

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another allocator than glibc's")

SIZE = 24 << 20
PAGES = SIZE // resource.getpagesize()


def faults_of_a_turn() -> int:
    """Page faults while a few tensors are made and freed."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    tensors = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(4)]
    del tensors
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_pages_are_asked_for_once() -> None:
    with kept_memory():
        assert min(faults_of_a_turn() for _ in range(4)) < PAGES / 4


def test_memory_is_given_back_at_the_end() -> None:
    with kept_memory():
        faults_of_a_turn()
        kept = resident()
    assert resident() < kept - 2 * SIZE
