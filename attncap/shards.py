"""Runs a model over shards of a corpus and summarises each: a shard's result is the same bytes wherever it is made.

A shard is computed by one thread from the first batch to the last, with one thread inside each operator: matrix
products choose their order of summation by the number of threads they are given, so this is what makes the result
independent of it. Several shards are computed side by side instead, which is also faster for small models.

B sequences   N tokens
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attncap.accumulate import Accumulator
from attncap.annotations import TagFunction
from attncap.capture import Capture
from attncap.corpus import Shard
from attncap.models import LoadedModel
from attncap.types import AttncapError, StatSpec

Advance = Callable[[int, int], None]
"""Told of (documents, tokens) as they are done; called from several threads."""


class ScanError(AttncapError, RuntimeError):
    """The model cannot be run over the corpus; the message says what to change."""


@dataclass(frozen=True)
class TokenShard:
    """A shard as token ids: model inputs per document, in order, and what was counted while they were made."""

    index: int
    sequences: list[dict[str, list[int]]]
    counts: dict[str, int]


@dataclass(frozen=True)
class ShardResult:
    """Summary of a shard and what was counted while it was made."""

    index: int
    accumulator: Accumulator
    counts: dict[str, int]


@dataclass(frozen=True)
class Work:
    """What is done with every shard.

    Attributes:
        max_tokens: documents are cut there, special tokens counted; None = never.
        batch_tokens: a batch holds at most this many tokens, padding counted, or one document.
    """

    loaded: LoadedModel
    spec: StatSpec
    tags: Mapping[str, TagFunction]
    max_tokens: int | None
    batch_tokens: int
    device: torch.device


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
        idle = _open_captures(undo, work, workers)
        pool = undo.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="attncap"))
        undo.callback(stop.set)  # before the pool waits for its threads
        for shard in shards:
            # In this thread: a tokenizer holds how it is to cut, so two threads may not use it at once.
            tokens = tokenize(shard, work.loaded.tokenizer, work.max_tokens)
            waiting.add(pool.submit(_run_shard, work, tokens, idle, stop, advance))
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


def _open_captures(undo: ExitStack, work: Work, workers: int) -> queue.SimpleQueue[Capture]:
    """A capture for each worker, each on modules of its own that share the weights."""
    idle: queue.SimpleQueue[Capture] = queue.SimpleQueue()
    model = work.loaded.model
    # Copied before the first capture is opened: an open one hangs on the model's modules.
    replicas = [model, *(_share_weights(model) for _ in range(workers - 1))]
    for replica in replicas:
        idle.put(undo.enter_context(Capture(replica, work.spec, tags=work.tags)))
    return idle


def _share_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules around the very same parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    replica: nn.Module = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    return replica


def _run_shard(
    work: Work, shard: TokenShard, idle: queue.SimpleQueue[Capture], stop: threading.Event, advance: Advance
) -> ShardResult:
    capture = idle.get()
    capture.accumulator = Accumulator(histogram=True)
    try:
        for batch in batches(shard.sequences, work.batch_tokens):
            if stop.is_set():
                raise _StoppedError
            _forward(work, capture, batch, shard.index)
            advance(len(batch), sum(len(sequence["input_ids"]) for sequence in batch))
        return ShardResult(shard.index, capture.accumulator, shard.counts)
    finally:
        idle.put(capture)


def _forward(work: Work, capture: Capture, batch: Sequence[Mapping[str, list[int]]], shard: int) -> None:
    inputs = {name: tensor.to(work.device) for name, tensor in pad(batch, work.loaded.tokenizer).items()}
    try:
        with torch.inference_mode():
            capture.model(**inputs)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ScanError(
            f"shard {shard}: out of memory on {work.device} with {len(batch)} documents of up to "
            f"{inputs['input_ids'].shape[1]} tokens; lower --batch-tokens (or --max-tokens)"
        ) from error
    except AttncapError:
        raise
    except Exception as error:
        raise ScanError(f"shard {shard}: the model failed ({type(error).__name__}: {error})") from error


def tokenize(shard: Shard, tokenizer: Any, max_tokens: int | None) -> TokenShard:
    """Documents as token ids with special tokens, cut at `max_tokens`.

    A document without any token is left out and counted among the empty ones.
    """
    # One token more than fits tells which documents are longer, without an end to how much more they are.
    cut = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens + 1}
    sequences = _encode(tokenizer, shard.texts, cut)
    truncated = 0
    for place, sequence in enumerate(sequences):
        if max_tokens is not None and len(sequence["input_ids"]) > max_tokens:
            truncated += 1
            sequences[place] = _encode(tokenizer, [shard.texts[place]], {"truncation": True, "max_length": max_tokens})[
                0
            ]
    kept = [sequence for sequence in sequences if sequence["input_ids"]]
    counts = {
        "documents": len(kept),
        "tokens": sum(len(sequence["input_ids"]) for sequence in kept),
        "truncated_documents": truncated,
        "empty_documents": len(sequences) - len(kept),
    }
    return TokenShard(shard.index, kept, counts)


def _encode(tokenizer: Any, texts: Sequence[str], cut: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    encoded = tokenizer(list(texts), add_special_tokens=True, padding=False, verbose=False, **cut)
    names = [name for name in encoded if name in ("input_ids", "token_type_ids")]
    return [{name: list(encoded[name][place]) for name in names} for place in range(len(texts))]


def batches(sequences: Sequence[dict[str, list[int]]], batch_tokens: int) -> Iterator[list[dict[str, list[int]]]]:
    """Sequences by (length, order), together while number times longest stays within `batch_tokens`."""
    batch: list[dict[str, list[int]]] = []
    for sequence in sorted(sequences, key=lambda sequence: len(sequence["input_ids"])):
        if batch and (len(batch) + 1) * len(sequence["input_ids"]) > batch_tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def pad(batch: Sequence[Mapping[str, list[int]]], tokenizer: Any) -> dict[str, Tensor]:
    """(B, N) tensors, padded on the right, with the ``attention_mask`` that says so."""
    longest = max(len(sequence["input_ids"]) for sequence in batch)
    fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": 0}
    inputs = {
        name: torch.tensor(
            [list(sequence[name]) + [fill[name]] * (longest - len(sequence[name])) for sequence in batch]
        )
        for name in batch[0]
    }
    lengths = torch.tensor([len(sequence["input_ids"]) for sequence in batch])
    inputs["attention_mask"] = (torch.arange(longest) < lengths[:, None]).to(torch.int64)
    return inputs
