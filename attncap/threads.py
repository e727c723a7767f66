"""How many threads the kernels on the CPU may have; imported with attncap, to learn of every fork from then on."""

from __future__ import annotations

import os

import torch

# OpenMP's pool, which is torch's too, does not survive a fork: its threads stay with the parent, and a child that wants
# them waits for ever.
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def usable() -> int:
    """torch's number, 1 in a forked child."""
    return 1 if _forked else torch.get_num_threads()
