"""Teams of processes that run one model together, each with its share of the heads (tensor parallelism).

The processes of a launch form teams of consecutive ranks. A team is one worker of a run: its first process, the leader,
reads the corpus, claims shards and writes files; it tells the others batch by batch what to compute. Each team is a
process group by itself, so that the teams wait for nothing of each other.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

from attncap.claims import LauncherError, Place
from attncap.types import AttncapError

# A leader may have to wait for other workers of the run. A process that ends is noticed without a clock.
_PATIENCE = timedelta(days=365)

BEGIN, SHARD, BATCH, COLLECT, END = "begin", "shard", "batch", "collect", "end"
"""What a leader says: load the model; a new shard; a batch of it; hand over what was counted; it is over."""

_DONE, _STOPPED, _FAILED = range(3)


class TeamError(AttncapError, RuntimeError):
    """A process of the team was lost, or its leader failed."""


class Team:
    """One process' place in its team; a team of one does nothing. Use it as a context, whose end is the team's.

    Attributes:
        place: that of the whole team among the teams of the launch.
        rank: of this process in the team; the leader's is 0.
        size: number of processes.
    """

    def __init__(self, place: Place, size: int) -> None:
        if size > 1 and (not place.launched or place.size % size):
            started = f"{place.size} were started" if place.launched else "no launcher started this one"
            raise LauncherError(
                f"--tensor-parallel: expected a multiple of {size} processes, as in torchrun --nproc-per-node {size}; "
                f"{started}"
            )
        self.rank, self.size = place.rank % size, size
        self.place = replace(place, rank=place.rank // size, size=place.size // size)
        self._in_step = True
        self._control: Any = None
        if size > 1:
            self._join()

    def _join(self) -> None:
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            store, _, _ = next(rendezvous("env://"))
            own = PrefixStore(f"attncap team {self.place.rank}", store)
            distributed.init_process_group(backend, store=own, rank=self.rank, world_size=self.size)
            self._control = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise LauncherError(f"--tensor-parallel: the processes cannot find each other ({error})") from error

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """What all processes do at once. After an exception inside they are no longer at the same place."""
        try:
            yield
        except BaseException:
            self._in_step = False
            raise

    def tell(self, what: str, content: Any = None) -> None:
        """Say something to all others of the team; for the leader."""
        if self.size > 1:
            self._broadcast([(what, content)])

    def hear(self) -> tuple[str, Any]:
        """What the leader says next.

        Raises:
            KeyboardInterrupt, TeamError: it ended because it was stopped, or because of an error.
        """
        heard: list[Any] = [None]
        self._broadcast(heard)
        what, content = heard[0]
        if what != END:
            return what, content
        self.gather(None)
        if content == _STOPPED:
            raise KeyboardInterrupt
        if content == _FAILED:
            raise TeamError("the first process of the team has failed; its message says why")
        return what, None

    def gather(self, content: Any) -> list[Any]:
        """What the processes say each, the leader first; the others get nothing."""
        from torch import distributed

        if self.size == 1:
            return [content]
        said = [None] * self.size if self.rank == 0 else None
        with self._watching():
            distributed.gather_object(content, said, group=self._control)
        return said or []

    def _broadcast(self, message: list[Any]) -> None:
        from torch import distributed

        with self._watching():
            distributed.broadcast_object_list(message, src=0, group=self._control)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            with self.step():
                yield
        except RuntimeError as error:
            raise TeamError(f"a process of this team of {self.size} was lost; the same command goes on") from error

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        from torch import distributed

        if self.rank == 0 and self._in_step:
            stopped = isinstance(error, KeyboardInterrupt)
            with contextlib.suppress(TeamError):  # of what has ended already
                self.tell(END, _DONE if error is None else _STOPPED if stopped else _FAILED)
                self.gather(None)  # until all have heard it
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


@contextlib.contextmanager
def only_the_leader_is_interrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM reach all processes of a team: what is to end with them the leader says, between batches."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
