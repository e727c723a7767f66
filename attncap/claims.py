"""Which worker of a run does what: ranks from the launcher, claims from the file system.

A claim is a lock on one byte of a file. The system drops it with the process that holds it, however that ends, so no
lease runs out and no clock is asked. Claims save work, they do not make results right: where a file system keeps no
locks between machines, two workers may compute the same shard, and write the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from attncap.types import AttncapError

try:
    import fcntl
except ImportError:  # Windows: one worker, and two scans into one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LauncherError(AttncapError, ValueError):
    """The launcher's environment contradicts itself."""


@dataclass(frozen=True)
class Place:
    """Which of how many workers this process is.

    Attributes:
        rank: from 0 to size - 1. size: number of workers that were started.
        local_rank: which of the workers of its machine; chooses the GPU.
        launched: whether a launcher started it, so that others may be at work on the same run.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launched: bool = False


# (rank, size, local rank) as torchrun, and as srun, name them.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that torchrun or Slurm gave to this process; the only one where neither did.

    Raises:
        LauncherError: a variable is no number, or the rank is not below the size.
    """
    for names in _LAUNCHERS:
        if names[0] not in environment or names[1] not in environment:
            continue
        try:
            rank, size, local = (int(environment.get(name, "0")) for name in names)
        except ValueError as error:
            raise LauncherError(f"{', '.join(names)}: expected whole numbers in the environment ({error})") from error
        if not 0 <= rank < size:
            raise LauncherError(f"{names[0]}: expected a number below {names[1]} = {size}, got {rank}")
        return Place(rank, size, local, launched=True)
    return Place()


class Claims:
    """Claims on numbered things, held until they are given back or the process ends.

    The file must not be opened a second time by the process: closing it would drop the claims.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def close(self) -> None:
        """Give everything back."""
        os.close(self._descriptor)

    def take(self, number: int) -> bool:
        """Whether the claim on `number` was free, and now is this process's; never waits."""
        return self._lock(number, waits=False)

    def give_back(self, number: int) -> None:
        """End a claim."""
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)

    @contextlib.contextmanager
    def alone(self, number: int) -> Iterator[None]:
        """Hold the claim on `number`, once whoever has it is done."""
        self._lock(number, waits=True)
        try:
            yield
        finally:
            self.give_back(number)

    def _lock(self, number: int, *, waits: bool) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB), 1, number)
        except OSError as error:
            if error.errno in _TAKEN and not waits:
                return False
            if error.errno not in _NO_LOCKS:
                raise
        return True


def lock_file(path: Path, shared: bool) -> int | None:
    """An open descriptor that holds a lock on `path`, made if it is not there; None where another process has it."""
    if fcntl is None:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        # The last holder before us removes the file as it leaves: a lock on a removed file protects nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)


def is_held_alone(descriptor: int) -> bool:
    """Whether no other process shares the lock that a descriptor of `lock_file` holds; from now on none can."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
