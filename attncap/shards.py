"""Runs a model over shards of a corpus and summarises each: a shard's result is the same bytes wherever it is made.

A shard is computed by one thread from the first batch to the last, with one thread inside each operator: matrix
products choose their order of summation by the number of threads they are given, so this is what makes the result
independent of it. Several shards are computed side by side instead, which is also faster for small models.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attncap.accumulate import Accumulator, Heads
from attncap.annotations import TagFunction
from attncap.attention_only import AttentionOnly
from attncap.capture import Capture
from attncap.claims import Place
from attncap.corpus import Shard
from attncap.encode import Encoded, EncodedShard, batches, encode, pad
from attncap.memory import kept_memory
from attncap.models import LoadedModel
from attncap.tables import Keeper
from attncap.team import BATCH, COLLECT, SHARD, Team, only_the_leader_is_interrupted
from attncap.types import AttncapError, StatSpec

Advance = Callable[[int, int], None]
"""Told of (documents, tokens) as they are done; called from several threads."""


class ScanError(AttncapError, RuntimeError):
    """The model cannot be run over the corpus; the message says what to change."""


@dataclass(frozen=True)
class ShardResult:
    """Summary of a shard, tables of its documents by kind, and what was counted while they were made."""

    index: int
    accumulator: Accumulator
    counts: dict[str, int]
    tables: dict[str, bytes]


@dataclass(frozen=True)
class Work:
    """What is done with every shard.

    Attributes:
        max_tokens: documents are cut there, special tokens counted; None = never.
        batch_tokens: a batch holds at most this many tokens, padding counted, or one document.
        keep: out of `attncap.tables.KINDS`.
        leave_out: told which documents the model cannot read.
        team: the processes that run the model together.
    """

    loaded: LoadedModel
    spec: StatSpec
    tags: Mapping[str, TagFunction]
    max_tokens: int | None
    batch_tokens: int
    device: torch.device
    keep: tuple[str, ...] = ()
    leave_out: Callable[[str], None] = lambda _: None
    team: Team = field(default_factory=lambda: Team(Place(), 1))


@dataclass(frozen=True)
class Worker:
    """A model, how it is run, and what captures it."""

    run: AttentionOnly
    capture: Capture


class _StoppedError(Exception):
    """The scan was interrupted while this shard was being made."""


def run_shards(
    work: Work, shards: Iterator[Shard], workers: int, done: Callable[[ShardResult], None], advance: Advance
) -> None:
    """Compute shards, `workers` at a time, and hand each result to `done` in this thread, in the order they finish.

    Raises:
        ScanError: the model failed, or ran out of memory.
        BaseException: whatever `shards` or `done` raised, KeyboardInterrupt included, once the batches in progress
            have ended.
    """
    stop = threading.Event()
    waiting: set[Future[ShardResult]] = set()
    with ExitStack() as undo:
        undo.enter_context(one_thread_per_operator())
        undo.enter_context(kept_memory())
        idle = open_workers(undo, work, workers)
        pool = undo.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="attncap"))
        undo.callback(stop.set)  # before the pool waits for its threads
        for shard in shards:
            # In this thread: a tokenizer holds how it is to cut, so two threads may not use it at once.
            encoded = encode(shard, work.loaded, work.max_tokens)
            for fault in encoded.faults:
                work.leave_out(fault)
            waiting.add(pool.submit(run_shard, work, encoded, idle, stop, advance))
            if len(waiting) > workers:  # one more than the workers, so that none of them waits for the corpus
                waiting = _collect(waiting, done)
        while waiting:
            waiting = _collect(waiting, done)


def _collect(waiting: set[Future[ShardResult]], done: Callable[[ShardResult], None]) -> set[Future[ShardResult]]:
    finished, still_waiting = wait(waiting, return_when=FIRST_COMPLETED)
    for future in finished:
        done(future.result())
    return still_waiting


@contextmanager
def one_thread_per_operator() -> Iterator[None]:
    """torch computes with one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_workers(undo: ExitStack, work: Work, workers: int) -> queue.SimpleQueue[Worker]:
    """So many workers, each on modules of its own that share the weights."""
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    model = work.loaded.model
    # Copied before the first capture is opened: an open one hangs on the model's modules.
    replicas = [model, *(share_weights(model) for _ in range(workers - 1))]
    for replica in replicas:
        capture = undo.enter_context(Capture(replica, work.spec, tags=work.tags))
        run = AttentionOnly(replica, capture.complete_layers)
        undo.enter_context(run.open())
        idle.put(Worker(run, capture))
    return idle


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules around the very same parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    replica: nn.Module = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    return replica


class Recording:
    """What one process counts of one shard."""

    def __init__(self, work: Work, worker: Worker, shard: int) -> None:
        self._work, self._worker, self._shard = work, worker, shard
        self.accumulator = Accumulator(histogram=True) if work.team.rank == 0 else _Share(histogram=True)
        self.keeper = Keeper(work.keep)
        if work.keep:
            self.accumulator.observer = self.keeper.observe
            worker.capture.stats = self.keeper
        worker.capture.accumulator = self.accumulator

    def add(self, batch: Sequence[Encoded]) -> None:
        """Run the model on a batch."""
        self.keeper.begin(batch)
        self._worker.capture.groups = [sequence.group for sequence in batch]
        with self._work.team.step():
            _forward(self._work, self._worker.run, batch, self._shard)

    def collect(self) -> None:
        """Add what the other processes of the team have counted."""
        if self._work.team.size == 1:
            return
        mine = self._work.team.rank == 0
        share = None if mine else (self.accumulator.to_bytes(), self.keeper.parts)
        for counted, parts in self._work.team.gather(share)[1:]:
            self.accumulator.merge(Accumulator.from_bytes(counted))
            for kind, columns in parts.items():
                self.keeper.parts[kind].extend(columns)


class _Share(Accumulator):
    """Counts modules whose heads are divided among the processes; the leader counts those that each has whole."""

    def add(
        self,
        module: str,
        values: Mapping[str, Tensor],
        counted: Mapping[str, Tensor] | Tensor,
        groups: Sequence[str] | None = None,
        *,
        heads: Heads | None = None,
    ) -> None:
        if heads is not None and len(heads.numbers) < heads.total:
            super().add(module, values, counted, groups, heads=heads)


def run_shard(
    work: Work, shard: EncodedShard, idle: queue.SimpleQueue[Worker], stop: threading.Event, advance: Advance
) -> ShardResult:
    """The result of a shard, made by a worker that is idle."""
    worker = idle.get()
    try:
        work.team.tell(SHARD, shard.index)
        recording = Recording(work, worker, shard.index)
        for batch in batches(shard.sequences, work.batch_tokens):
            if stop.is_set():
                raise _StoppedError
            work.team.tell(BATCH, batch)
            recording.add(batch)
            advance(len(batch), sum(sequence.length for sequence in batch))
        work.team.tell(COLLECT)
        recording.collect()
        return ShardResult(shard.index, recording.accumulator, shard.counts, recording.keeper.tables())
    finally:
        idle.put(worker)


def follow(work: Work) -> None:
    """Compute what the leader of the team says, until it says that it is over.

    Raises:
        TeamError, KeyboardInterrupt: it failed, or was stopped.
    """
    with only_the_leader_is_interrupted(), ExitStack() as undo:
        undo.enter_context(one_thread_per_operator())
        undo.enter_context(kept_memory())
        worker = open_workers(undo, work, 1).get()
        while (heard := work.team.hear())[0] in (SHARD, BATCH, COLLECT):
            what, content = heard
            if what == SHARD:
                recording = Recording(work, worker, content)
            elif what == BATCH:
                recording.add(content)
            else:
                recording.collect()


def _forward(work: Work, run: AttentionOnly, batch: Sequence[Encoded], shard: int) -> None:
    inputs = {name: tensor.to(work.device) for name, tensor in pad(batch, work.loaded.tokenizer).items()}
    try:
        with torch.inference_mode():
            run(**inputs)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ScanError(
            f"shard {shard}: out of memory on {work.device} with {len(batch)} documents of up to "
            f"{max(sequence.length for sequence in batch)} tokens; lower --batch-tokens (or --max-tokens)"
        ) from error
    except AttncapError:
        raise
    except Exception as error:
        raise ScanError(f"shard {shard}: the model failed ({type(error).__name__}: {error})") from error
