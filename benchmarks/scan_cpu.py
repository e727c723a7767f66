"""How fast a corpus is read with statistics and without: tokens a second of the model of `attncap scan builtin:minilm`.

    python -m benchmarks.scan_cpu [--documents N] [--rounds N] [--results FOLDER]

Each batch goes through the model as a scan sends it, in every thread, by turns: as the model is, with torch's own
attention; captured, the forward a whole one; and as a scan runs it, which ends a forward with the last attention.
Tokenizing is left out of the three. Then the model as it is and the whole of a scan take turns, all batches at a time:
the corpus is read and tokenized while the model runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from attncap.attention_only import AttentionOnly
from attncap.capture import Capture
from attncap.corpus import Corpus, CorpusOptions
from attncap.encode import Encoded, EncodedShard, batches, encode, pad
from attncap.memory import kept_memory
from attncap.models import load_model
from attncap.plan import tag_functions
from attncap.scan import DEFAULT_SPEC, SHARD_SIZE
from attncap.shards import Recording, Work, Worker, one_thread_per_operator, run_shards, share_weights
from benchmarks.machine import describe, medians

PLAIN = "torch SDPA"
Contestants = dict[str, Callable[[Sequence[Encoded]], None]]


def make_work(threads: int, documents: int) -> tuple[Work, list[EncodedShard]]:
    """What a scan of the docstrings does, and its first documents as token ids."""
    loaded = load_model("builtin:minilm")
    work = Work(loaded, DEFAULT_SPEC, tag_functions(loaded, None, lambda _: None), 512, 1024, torch.device("cpu"))
    corpus = Corpus(["builtin:docstrings"], CorpusOptions())
    shards = corpus.shards(corpus.survey(SHARD_SIZE))
    tokens: list[EncodedShard] = []
    # As many shards for each thread.
    while len(tokens) % threads or sum(len(shard.sequences) for shard in tokens) < documents:
        tokens.append(encode(next(shards), loaded, 512))
    return work, tokens


def contestants(undo: ExitStack, work: Work, shard: int) -> Contestants:
    """What is done with a batch of a shard, each on modules of its own that share the weights."""
    model = share_weights(work.loaded.model)

    def plain(batch: Sequence[Encoded]) -> None:
        with torch.inference_mode():
            model(**pad(batch, work.loaded.tokenizer))

    found: Contestants = {PLAIN: plain}
    for name, ends in (("captured", False), ("as a scan", True)):
        replica = share_weights(work.loaded.model)
        capture = undo.enter_context(Capture(replica, work.spec, tags=work.tags))
        run = AttentionOnly(replica, capture.complete_layers if ends else ())
        undo.enter_context(run.open())
        found[name] = Recording(work, Worker(run, capture), shard).add
    return found


def time_batches(work: Work, shards: Sequence[EncodedShard], threads: int, rounds: int) -> dict[str, float]:
    """Seconds of each contestant: over all batches the sum of their medians, threads side by side."""

    def time_shard(shard: EncodedShard, calls: Contestants) -> list[dict[str, float]]:
        return [
            medians({name: partial(call, batch) for name, call in calls.items()}, rounds)
            for batch in batches(shard.sequences, work.batch_tokens)
        ]

    with ExitStack() as undo:
        calls = [contestants(undo, work, shard.index) for shard in shards]
        with ThreadPoolExecutor(threads) as pool:
            seconds = [times for of_shard in pool.map(time_shard, shards, calls) for times in of_shard]
    return {name: sum(times[name] for times in seconds) / threads for name in calls[0]}


def run_plain(work: Work, shards: Sequence[EncodedShard], threads: int) -> None:
    """The model as it is, on all batches."""

    def run(shard: EncodedShard) -> None:
        for batch in batches(shard.sequences, work.batch_tokens):
            with torch.inference_mode():
                work.loaded.model(**pad(batch, work.loaded.tokenizer))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, shards))


def run_whole(work: Work, shards: int, threads: int) -> None:
    """The first shards of a scan, from the text on."""
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
    with one_thread_per_operator():
        with kept_memory():
            seconds = time_batches(work, shards, arguments.threads, arguments.rounds)
        whole = medians(
            {
                PLAIN: lambda: run_plain(work, shards, arguments.threads),
                "whole scan": lambda: run_whole(work, len(shards), arguments.threads),
            },
            arguments.rounds,
        )
    ratios = {name: seconds[PLAIN] / seconds[name] for name in seconds if name != PLAIN}
    ratios["whole scan"] = whole[PLAIN] / whole["whole scan"]
    figures: dict[str, float] = {
        "tokens": tokens,
        "documents": sum(len(shard.sequences) for shard in shards),
        **{f"{name} [tokens/s]": round(tokens / time) for name, time in seconds.items()},
        "whole scan [tokens/s]": round(tokens / whole["whole scan"]),
        **{f"{name} / {PLAIN}": round(ratio, 3) for name, ratio in ratios.items()},
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
