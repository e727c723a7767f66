"""What workers say of themselves while a run is being made, and `attncap status`, which reads it.

Each worker keeps a note among the parts of the run and a claim of its own as a sign of life, so that nobody compares
clocks of two machines: a worker is at work as long as the system holds its claim. Notes go with the parts when the
run is finished.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attncap.claims import Claims, Place
from attncap.parts import write_whole
from attncap.progress import Progress, clock, plural
from attncap.store import RunFolder, RunMismatchError

WORKING, DONE, STOPPED, FAILED = "working", "done", "stopped", "failed"

# Claims of shards are smaller numbers.
_SIGNS_OF_LIFE = 1 << 48
_SHOWN = 8


@dataclass
class Note:
    """One worker: its place, what it has done since it began, and how it ended."""

    rank: int
    size: int
    host: str
    pid: int
    sign: int  # its claim
    state: str = WORKING
    message: str = ""
    documents: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """For people."""
        return f"worker {self.rank} of {self.size} on {self.host} (process {self.pid})"


class WorkerNote:
    """The note of this process; use it as a context, whose end is written down."""

    def __init__(self, folder: RunFolder, place: Place, claims: Claims, progress: Progress) -> None:
        self._progress = progress
        sign = _SIGNS_OF_LIFE + secrets.randbits(32)
        self._note = Note(place.rank, place.size, socket.gethostname(), os.getpid(), sign)
        self._path = folder.parts / f"worker-{sign:x}.json"
        claims.take(sign)

    def write(self) -> None:
        """Write down how far this worker is."""
        note, progress = self._note, self._progress
        note.documents, note.tokens, note.seconds = progress.own_documents, progress.tokens, progress.seconds()
        write_whole(self._path, json.dumps(asdict(note)).encode(), durable=False)

    def __enter__(self) -> WorkerNote:
        self._path.parent.mkdir(exist_ok=True)
        self.write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._note.state = DONE
        elif isinstance(error, KeyboardInterrupt):
            self._note.state = STOPPED
        else:
            self._note.state, self._note.message = FAILED, str(error) or type(error).__name__
        if self._path.parent.is_dir():  # it goes when the run is finished
            with suppress(OSError):  # of a full disk there is another message
                self.write()


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        complete: whether it is finished.
        scan: scan.json; empty while the corpus is read through, before there is one.
        shards_done, shards: how many there are.
        working: notes of the workers that are at work. ended: those of the others, killed ones included.
    """

    path: Path
    complete: bool
    scan: dict[str, Any]
    shards_done: int
    shards: int
    working: tuple[Note, ...]
    ended: tuple[Note, ...]

    @property
    def tokens_per_second(self) -> float:
        """Of all workers at work, each since it began."""
        return sum(note.tokens / note.seconds for note in self.working if note.seconds)

    @property
    def died(self) -> tuple[Note, ...]:
        """Workers that ended without a word, and those that failed."""
        return tuple(note for note in self.ended if note.state in (WORKING, FAILED))


def read_status(path: str | os.PathLike[str]) -> Status:
    """How far the run in the folder `path` is.

    Raises:
        RunMismatchError: there is no run.
        RunDamagedError: scan.json is damaged, or the table of a finished run.
    """
    folder = RunFolder(Path(path))
    folder.check_kinds()
    scan = folder.read_scan()
    if scan is None and folder.claims_file.is_file():
        return Status(folder.path, complete=False, scan={}, shards_done=0, shards=0, working=(), ended=())
    if scan is None:
        raise RunMismatchError(
            f"{path}: no run of attncap (no scan.json); make one with `attncap scan MODEL CORPUS -o {path}`"
        )
    complete = scan.get("status") == "complete"
    if complete:
        folder.check_heads(scan)
    shards = scan["progress"]["shards_total"]
    done = shards if complete else len(folder.finished_shards())
    working, ended = _notes(folder)
    return Status(folder.path, complete, scan, done, shards, working, ended)


def _notes(folder: RunFolder) -> tuple[tuple[Note, ...], tuple[Note, ...]]:
    """(those at work, those that have ended), by rank."""
    notes = []
    for path in folder.parts.glob("worker-*.json"):
        with suppress(OSError, ValueError, TypeError):  # gone meanwhile, or no note
            notes.append(Note(**json.loads(path.read_bytes())))
    notes.sort(key=lambda note: (note.rank, note.sign))
    if not folder.claims_file.exists():
        return (), tuple(notes)
    with closing(Claims(folder.claims_file)) as claims:
        alive = [not claims.take(note.sign) for note in notes]
    working = tuple(note for note, lives in zip(notes, alive, strict=True) if lives)
    return working, tuple(note for note, lives in zip(notes, alive, strict=True) if not lives)


def print_status(status: Status, say: Callable[[str], None]) -> None:
    """A few lines for people."""
    if not status.scan:
        say(f"{status.path}: a scan is reading its corpus through, or was ended while it did; no shard is done yet")
        say("If nobody is at work the same `attncap scan` command goes on.")
        return
    share = 100 * status.shards_done / max(1, status.shards)
    state = "complete" if status.complete else "running" if status.working else "not finished, and nobody is at work"
    documents = status.scan["corpus"]["documents"]
    say(
        f"{status.path}: {state}; {status.shards_done:,} of {plural(status.shards, 'shard')} ({share:.1f} %) of "
        f"{plural(documents, 'document')}"
    )
    if status.working:
        say(f"{plural(len(status.working), 'worker')} at work: {status.tokens_per_second:,.0f} tokens/s{_left(status)}")
    for note in status.working[:_SHOWN]:
        rate = note.tokens / note.seconds if note.seconds else 0.0
        say(f"  {note.name}: {plural(note.documents, 'document')}, {rate:,.0f} tokens/s")
    for note in status.died[:_SHOWN]:
        say(f"  {note.name}: {note.message if note.state == FAILED else 'died; its shard in progress is done again'}")
    for notes in (status.working, status.died):
        if len(notes) > _SHOWN:
            say(f"  and {len(notes) - _SHOWN} more")
    failed = status.scan["counts"].get("failed_documents", 0)
    if failed:
        say(f"{plural(failed, 'document')} left out because they could not be read")
        for fault in status.scan["corpus"].get("faults", ())[:_SHOWN]:
            say(f"  {fault}")
    if not status.complete and not status.working:
        say("The same `attncap scan` command goes on from there.")


def _left(status: Status) -> str:
    """Time left at the rate of the workers at work."""
    documents = sum(note.documents / note.seconds for note in status.working if note.seconds)
    if not documents:
        return ""
    left = status.scan["corpus"]["documents"] * (1 - status.shards_done / max(1, status.shards))
    return f", {documents:,.1f} documents/s, about {clock(left / documents)} left"
