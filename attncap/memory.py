"""What happens to memory on the CPU that a forward frees."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt, and the highest values that it comes to by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_MMAP, _MOST_TRIM = 32 << 20, 64 << 20
_NEVER = 2**31 - 1


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside the block glibc keeps what is freed for the next forward, at the end it gives back what is left.

    The system would hand out the same pages anew in every forward, each one cleared: a few percent of the time of a
    small model. Other allocators, and other systems, are left as they are.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _MOST_MMAP)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, _MOST_TRIM)
        library.malloc_trim(0)
