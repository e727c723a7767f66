"""How fast a corpus is read with statistics and without: tokens a second of the model of `attncap scan builtin:minilm`.

    python -m benchmarks.scan_cpu [--documents N] [--rounds N] [--results FOLDER]

The same batches of the same documents go through the model as a scan sends them, one thread a shard, taking turns: as
it is, with torch's own attention; captured, each forward a whole one; and as a scan runs it, which ends a forward with
the last attention. Tokenizing is left out of the three. A fourth is the whole of a scan: the corpus is read and
tokenized while the model runs.
"""

from __future__ import annotations

import argparse
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from attncap import attention_only
from attncap.corpus import Corpus, CorpusOptions
from attncap.encode import EncodedShard, batches, encode, pad
from attncap.memory import kept_memory
from attncap.models import load_model
from attncap.plan import tag_functions
from attncap.scan import DEFAULT_SPEC, SHARD_SIZE
from attncap.shards import Work, one_thread_per_operator, open_workers, run_shard, run_shards
from benchmarks.machine import describe, medians


def make_work(threads: int, documents: int) -> tuple[Work, list[EncodedShard]]:
    """What a scan of the docstrings does, and its first documents as token ids."""
    loaded = load_model("builtin:minilm")
    work = Work(loaded, DEFAULT_SPEC, tag_functions(loaded, None, lambda _: None), 512, 1024, torch.device("cpu"))
    corpus = Corpus(["builtin:docstrings"], CorpusOptions())
    shards = corpus.shards(corpus.survey(SHARD_SIZE))
    tokens: list[EncodedShard] = []
    while len(tokens) < threads or sum(len(shard.sequences) for shard in tokens) < documents:
        tokens.append(encode(next(shards), loaded, 512))
    return work, tokens


def run_plain(work: Work, shards: list[EncodedShard], threads: int) -> None:
    """The model as it is."""

    def run(shard: EncodedShard) -> None:
        for batch in batches(shard.sequences, work.batch_tokens):
            with torch.inference_mode():
                work.loaded.model(**pad(batch, work.loaded.tokenizer))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, shards))


def run_captured(work: Work, shards: list[EncodedShard], threads: int, whole: bool) -> None:
    """The model captured, its forwards whole ones or as a scan ends them."""
    no_end = patch.object(attention_only, "_is_fixed", lambda _model: False)
    with no_end if whole else nullcontext(), ExitStack() as undo, ThreadPoolExecutor(threads) as pool:
        idle = open_workers(undo, work, threads)
        list(pool.map(lambda shard: run_shard(work, shard, idle, threading.Event(), lambda *_: None), shards))


def run_whole(work: Work, shards: int, threads: int) -> None:
    """As `run_captured`, from the text on."""
    corpus = Corpus(["builtin:docstrings"], CorpusOptions())
    survey = corpus.survey(SHARD_SIZE)
    run_shards(work, corpus.shards(survey, range(shards)), threads, lambda _: None, lambda *_: None)


def padding(work: Work, shards: list[EncodedShard]) -> float:
    """Share of the computed tokens that is padding."""
    groups = [batch for shard in shards for batch in batches(shard.sequences, work.batch_tokens)]
    computed = sum(len(batch) * max(one.length for one in batch) for batch in groups)
    return 1 - sum(one.length for batch in groups for one in batch) / computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="folder for scan_cpu.json")
    arguments = parser.parse_args()
    work, shards = make_work(arguments.threads, arguments.documents)
    tokens = sum(sequence.length for shard in shards for sequence in shard.sequences)
    with one_thread_per_operator(), kept_memory():
        seconds = medians(
            {
                "torch SDPA": lambda: run_plain(work, shards, arguments.threads),
                "captured": lambda: run_captured(work, shards, arguments.threads, whole=True),
                "as a scan": lambda: run_captured(work, shards, arguments.threads, whole=False),
                "whole scan": lambda: run_whole(work, len(shards), arguments.threads),
            },
            arguments.rounds,
        )
    speeds = {f"{name} [tokens/s]": round(tokens / time) for name, time in seconds.items()}
    figures: dict[str, float] = {
        "tokens": tokens,
        "documents": sum(len(shard.sequences) for shard in shards),
        **speeds,
        **{f"{name} / torch SDPA": round(seconds["torch SDPA"] / seconds[name], 3) for name in list(seconds)[1:]},
        "padding": round(padding(work, shards), 4),
    }
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    if arguments.results:
        arguments.results.mkdir(parents=True, exist_ok=True)
        record = {"machine": describe(arguments.threads), "results": figures}
        (arguments.results / "scan_cpu.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
