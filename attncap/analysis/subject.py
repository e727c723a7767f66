"""What the analyses of a run work on: its model, loaded again and verified, and documents of its corpus in batches."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attncap.analysis.batches import Loss
from attncap.analysis.blocks import attention_blocks
from attncap.analysis.objective import Objective, objective_of
from attncap.analysis.results import head_places
from attncap.analysis.roles import means_by_stat
from attncap.corpus import Corpus, CorpusOptions, ShardSize
from attncap.encode import Encoded, batches, encode, pad
from attncap.layers import module_of
from attncap.models import LoadedModel, choose_device, load_model
from attncap.store import Run, RunMismatchError
from attncap.types import UnsupportedError

_BATCH_TOKENS = 2048
_FEWEST_TOKENS = 2
_FEW = 8

Say = Callable[[str], None]
Advance = Callable[[int, int], None]
"""Told of (forwards, tokens) as they are done."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A run's model, and documents of its corpus, which are read when they are first asked for.

    Attributes:
        wanted: how many documents, evenly spaced over the corpus.
        say: told what takes a while. advance: told of every forward.
        conllu: a file of sentences with dependencies; "" where none was given.
    """

    run: Run
    loaded: LoadedModel
    wanted: int
    say: Say
    advance: Advance
    conllu: str = ""

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """The documents as the scan encodes them."""
        return [_inputs(self.loaded, batch) for batch in batches(self._encoded, _BATCH_TOKENS)]

    @cached_property
    def few(self) -> list[dict[str, Tensor]]:
        """Some of them, each a batch of its own, for what runs the model some hundred times."""
        return [_inputs(self.loaded, [one]) for one in self._encoded[:: -(-len(self._encoded) // _FEW)]]

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self._encoded)

    @cached_property
    def _encoded(self) -> list[Encoded]:
        self.say(f"reading {', '.join(self.run.scan['corpus']['sources'])}")
        return _documents(self.run, self.loaded, self.wanted)

    @cached_property
    def objective(self) -> Objective:
        """What the model is measured by."""
        options = self.run.scan["options"]
        found = objective_of(self.loaded, self.few, dtype=options["dtype"], options=options["model"])

        def told(loss: Loss) -> Loss:
            def forward(model: Any, batch: Any) -> Any:
                value = loss(model, batch)
                self.advance(1, _tokens(batch))
                return value

            return forward

        total = None if found.total is None else told(found.total)
        return replace(found, loss=told(found.loss), total=total)

    @cached_property
    def layers(self) -> list[str]:
        """Names of the attention modules in order of definition."""
        return [block.name for block in attention_blocks(self.loaded.model)]

    def watched(self, step: int = 1) -> Iterator[Mapping[str, Tensor]]:
        """Every `step`-th batch, which is told of as it is done."""
        for batch in self.batches[::step]:
            yield batch
            self.advance(1, _tokens(batch))

    def mean(self, stat: str) -> dict[tuple[str, int], float]:
        """(module, head) -> mean of a statistic of the scan over all groups; empty where the scan has none."""
        return {(head.module, head.head): head.mean for head in means_by_stat(self.run.heads).get(stat, ())}

    def table(self, stat: str, layers: Sequence[str], heads: int) -> Tensor:
        """(layers, heads) float64 of `mean`, NaN where there is none."""
        means = self.mean(stat)
        rows = [[means.get((layer, head), torch.nan) for head in range(heads)] for layer in layers]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(layers), heads)

    def heads(self, layers: Sequence[str], tables: Mapping[str, Tensor]) -> dict[str, list[Any]]:
        """`Result.data` of tables (layers, heads), layers numbered as in heads.parquet."""
        return head_places(layers, tables, [self.number(layer) for layer in layers])

    def number(self, module: str) -> int:
        """Of a layer as in heads.parquet, by the name of its attention module.

        Raises:
            UnsupportedError: the scan has none of that name.
        """
        for name in (module, module_of(module)):
            if name in self._numbers:
                return self._numbers[name]
        raise UnsupportedError(f"model: the scan has no heads of {module}")

    @cached_property
    def _numbers(self) -> dict[str, int]:
        columns = (self.run.heads[name].to_pylist() for name in ("module", "layer"))
        return dict(zip(*columns, strict=True))


def load_subject(run: Run, documents: int, device: str, say: Say, advance: Advance, conllu: str = "") -> Subject:
    """Load the model of a run; the arguments are as in `Subject`.

    Raises:
        RunMismatchError: the model is not the one that was scanned; the corpus, once it is asked for.
        ModelError, CorpusError: they cannot be read.
    """
    options, described = run.scan["options"], run.scan["model"]
    loaded = load_model(described["name"], options["dtype"], str(choose_device(device)), options["model"])
    if loaded.fingerprint != described["fingerprint"]:
        raise RunMismatchError(
            f"{run.path}: was made with other weights than {described['name']} has now; "
            "analyse it where that model is, or scan anew"
        )
    return Subject(run, loaded, documents, say, advance, conllu)


def _inputs(loaded: LoadedModel, batch: Sequence[Encoded]) -> dict[str, Tensor]:
    return {name: tensor.to(loaded.device) for name, tensor in pad(batch, loaded.tokenizer).items()}


def _documents(run: Run, loaded: LoadedModel, number: int) -> list[Encoded]:
    """Documents evenly spaced over the corpus, which must be the one that was scanned."""
    described = run.scan["corpus"]
    corpus = Corpus(described["sources"], CorpusOptions(**described["options"]))
    size = ShardSize(**run.scan["options"]["shard"])
    survey = corpus.survey(size)
    if survey.fingerprint != described["fingerprint"]:
        raise RunMismatchError(
            f"{run.path}: was made from another corpus than {', '.join(described['sources'])} is now; "
            "put it back, or scan anew"
        )
    number = min(number, survey.documents)
    wanted = {place * survey.documents // number for place in range(number)}
    limits = [limit for limit in (loaded.max_tokens, run.scan["limits"]["max_tokens"]) if limit is not None]
    ends = list(itertools.accumulate(survey.shard_documents))
    shards = {bisect.bisect_right(ends, place) for place in wanted}
    found = []
    for shard in corpus.shards(survey, shards):
        sequences = encode(shard, loaded, min(limits, default=None)).sequences
        found += [one for one in sequences if one.number in wanted and one.length >= _FEWEST_TOKENS]
    if not found:
        raise RunMismatchError(f"{run.path}: none of {number} documents has {_FEWEST_TOKENS} tokens; give more")
    return found


def _tokens(batch: Mapping[str, Tensor]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else len(next(iter(batch.values())))
