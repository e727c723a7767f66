"""A tiny BERT with its own tokenizer in a folder, texts for it, and scans in child processes that can be killed."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch

LONGEST = 32
LAYERS, HEADS = 2, 2

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = [f"{first}{second}" for first in "bdfgkl" for second in ("a", "e", "i", "o", "u")]


@contextmanager
def small_shards(documents: int) -> Iterator[None]:
    """Scans inside cut their corpora into shards of so many documents."""
    from attncap import scan
    from attncap.corpus import ShardSize

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "SHARD_SIZE", ShardSize(documents=documents))
        yield


def save_model(folder: Path, seed: int = 0) -> Path:
    """A random BERT of two layers and two heads that takes 32 tokens."""
    import transformers

    folder.mkdir(parents=True)
    vocabulary = [*_SPECIAL, *_WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=LONGEST)
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=40,
        initializer_range=0.6,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


def save_gpt2(folder: Path, **changes: Any) -> Path:
    """A random GPT-2 whose tokenizer has no special token at all."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(_WORDS)}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LONGEST)
    fast.model_input_names = ["input_ids", "attention_mask"]
    fast.save_pretrained(folder)
    sizes = {"vocab_size": len(_WORDS), "n_layer": LAYERS, "n_head": HEADS, "n_embd": 16, "n_positions": 40}
    transformers.GPT2Model(transformers.GPT2Config(**{**sizes, **changes})).save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """A random Llama of two layers, four heads and two key/value heads, whose words are those of `save_gpt2`."""
    import transformers

    save_gpt2(folder)
    sizes = {"vocab_size": len(_WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=40, initializer_range=0.6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaModel(config).save_pretrained(folder)
    return folder


def texts(number: int, seed: int = 0, longest: int = 45) -> list[str]:
    """Documents of 1 to `longest` words, some longer than the model takes."""
    source = random.Random(seed)
    return [" ".join(source.choices(_WORDS, k=source.randint(1, longest))) for _ in range(number)]


def write_jsonl(path: Path, documents: Sequence[Any]) -> Path:
    """One document a line under the key "text"."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


# Imports once and forks for every command, so that a kill costs the time of a scan and not that of an import.
# Torch's thread pools do not survive a fork, so nothing is computed in the parent.
_HOST = """
import json, os, signal, sys, time
import pandas, pydantic.type_adapter, pyarrow.pandas_compat, pyarrow.parquet  # which a scan comes to import
import transformers
from transformers import AutoModel, AutoTokenizer, BertModel, BertTokenizerFast, conversion_mapping
from attncap import accumulate_io, cli, commands, corpus, cpu, ops, scan

conversion_mapping.get_checkpoint_conversion_mapping("bert")

scan.SHARD_SIZE = corpus.ShardSize(documents=32)

def child_of(order, rank):
    child = os.fork()
    if child:
        return child
    sys.stdin.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    if order["workers"]:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(order["workers"]), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(order["port"]), GLOO_SOCKET_IFNAME="lo")
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = cli.main(order["arguments"])
    sys.stdout.flush()
    os._exit(code)

for line in sys.stdin:
    order = json.loads(line)
    open(order["log"], "w").close()
    children = [child_of(order, rank) for rank in range(max(1, order["workers"]))]
    begun = time.monotonic()
    for delay, rank in order["kills"]:
        while order["after"] and not os.path.exists(order["after"]) and time.monotonic() < begun + 60:
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(children[rank], order["signal"])  # a child that has ended is still to be waited for
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps([codes, time.monotonic() - begun]), flush=True)
"""


class CommandHost:
    """Runs `attncap` in child processes, by itself or as several workers, and sends them signals."""

    def __init__(self, log: Path) -> None:
        self._log = log
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
        self._host = subprocess.Popen(
            [sys.executable, "-c", _HOST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self, arguments: Sequence[Any], signal: int = 0, delay: float = 0.0, after: Path | None = None
    ) -> tuple[int, float]:
        """(exit code or minus the signal it died of, seconds) of one command.

        `signal` is sent `delay` seconds after its start, or after the file `after` is there.
        """
        (code,), seconds = self._give(arguments, 0, signal, [(delay, 0)] if signal else [], after)
        return code, seconds

    def run_workers(
        self,
        arguments: Sequence[Any],
        workers: int,
        kills: Sequence[tuple[float, int]] = (),
        signal: int = SIGKILL,
        after: Path | None = None,
    ) -> tuple[list[int], float]:
        """(exit codes, seconds) of one command started so many times, as torchrun does.

        `signal` is sent at `kills`, (delay, rank) each, counted from the start or from when the file `after` is there.
        """
        return self._give(arguments, workers, signal, kills, after)

    def _give(
        self,
        arguments: Sequence[Any],
        workers: int,
        signal: int,
        kills: Sequence[tuple[float, int]],
        after: Path | None,
    ) -> tuple[list[int], float]:
        order = {"arguments": [str(argument) for argument in arguments], "workers": workers, "signal": int(signal)}
        order |= {"kills": list(kills), "after": str(after) if after else None, "log": str(self._log)}
        with socket.create_server(("127.0.0.1", 0)) as free:
            order["port"] = free.getsockname()[1]
        assert self._host.stdin is not None
        assert self._host.stdout is not None
        self._host.stdin.write(json.dumps(order) + "\n")
        self._host.stdin.flush()
        codes, seconds = json.loads(self._host.stdout.readline())
        return codes, seconds

    def log(self) -> str:
        """What the newest command said."""
        return self._log.read_text(encoding="utf-8")

    def close(self) -> None:
        """End the host."""
        for stream in (self._host.stdin, self._host.stdout):
            assert stream is not None
            stream.close()
        self._host.wait()
