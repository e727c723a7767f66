"""How a scan is computed, apart from what it captures and what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attncap.corpus import CorpusOptions
from attncap.models import DTYPES
from attncap.plan import TAG_NAMES
from attncap.tables import KINDS, ROWS
from attncap.types import StatSpec

_LEAST = {"max_tokens": 3, "batch_tokens": 1, "workers": 1, "shard_characters": 1, "tensor_parallel": 1}
_PLANS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")


@dataclass(frozen=True)
class ScanOptions:
    """How a scan is computed.

    Attributes:
        tags: names out of `TAG_NAMES`; each is a statistic. None = those of `DEFAULT_TAGS` that the tokenizer allows.
        max_tokens: cut documents there instead of at the model's own length, where that is longer.
        batch_tokens: how many tokens are computed at once; None = what suits the device.
        dtype: one of `attncap.models.DTYPES`.
        device: a torch device; "auto" takes the GPU where there is one.
        keep: tables of single documents to write, "sequences" or "rows" (see `attncap.tables`).
        shard_characters: a shard ends with the document that brings it to so many characters; None = what suits the
            device. A shard's summary takes about 1.3 KB per head and statistic, however long the shard is, and a kill
            costs a shard; see docs/scale.md.
        model: arguments of Transformers' ``from_pretrained`` (see `attncap.models.load_model`).
        tensor_parallel: processes of the launch that run the model together, each with its share of the heads.
        workers: shards computed at once; None = the CPU threads that torch has. Without influence on the result.
    """

    tags: tuple[str, ...] | None = None
    max_tokens: int | None = None
    batch_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    workers: int | None = None
    keep: tuple[str, ...] = ()
    shard_characters: int | None = None
    tensor_parallel: int = 1
    model: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tags", "keep"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected a tuple of names, got {getattr(self, name)!r}")
        for kind in self.keep:
            if kind not in KINDS:
                raise ValueError(f"keep: expected {' or '.join(KINDS)}, got {kind!r}")
        tags = self.tags or ()
        for tag in tags:
            if tag not in TAG_NAMES:
                raise ValueError(f"tags: expected names out of {', '.join(TAG_NAMES)}, got {tag!r}")
            if tags.count(tag) > 1:
                raise ValueError(f"tags: expected each name once, got {tag} {tags.count(tag)} times")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise TypeError(f"{name}: expected an int, got {value!r}")
            if value is not None and value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")
        for name in _PLANS:
            if name in self.model:
                raise ValueError(f"model_option: give --tensor-parallel, a number of processes, instead of {name}")


def check_arguments(spec: StatSpec, corpus_options: CorpusOptions, options: ScanOptions) -> None:
    """Refuse what are no options, and a table of rows without a limit of documents."""
    expected = (
        ("spec", spec, StatSpec),
        ("corpus_options", corpus_options, CorpusOptions),
        ("options", options, ScanOptions),
    )
    for name, given, kind in expected:
        if not isinstance(given, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(given).__name__}")
    if ROWS in options.keep and corpus_options.limit is None:
        raise ValueError("keep: rows is for single examples, so it needs a limit of documents as well")
