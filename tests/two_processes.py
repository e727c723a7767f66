"""A function run in two processes that know each other (gloo), and what each of them found."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch import multiprocessing as processes

WORLD = 2

Find = Callable[[int], dict[str, Any]]
"""Of the rank: tensors, numbers and text under names; a function of a module, for it is pickled."""


def found_by(find: Find) -> list[dict[str, Any]]:
    """What each process found."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        processes.spawn(_work, (find, folder), nprocs=WORLD)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def _work(rank: int, find: Find, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.save(find(rank), Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
