"""`scan`: head statistics of a model over a corpus, into a run folder that can be stopped and resumed at will.

The corpus is cut into shards of a fixed number of documents. Each shard's summary is a file; the end merges them in
order. What a run holds therefore depends on the model, the corpus and the options, and on nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attncap.accumulate import Accumulator
from attncap.corpus import Corpus, CorpusOptions, ShardSize
from attncap.extras import require
from attncap.models import DTYPES, LoadedModel, ModelError, load_model
from attncap.plan import TAG_NAMES, check_capturable, differences, identity, make_plan, names_another, tag_functions
from attncap.progress import Progress
from attncap.shards import ShardResult, Work, one_thread_per_operator, run_shards
from attncap.store import Part, Run, RunDamagedError, RunError, RunFolder, RunMismatchError, read_run
from attncap.types import AttncapError, StatSpec

SHARD_SIZE = ShardSize()
"""A shard is what a kill costs at most, per worker. Part of what a run is."""

DEFAULT_SPEC = StatSpec(offsets=(-1, 1), distance=True, collision=True, received=True)

# Small batches stay in a core's cache and hold documents of nearly one length; a GPU wants more at once.
_BATCH_TOKENS = {"cpu": 1024}
_BATCH_TOKENS_ELSEWHERE = 16384

_SHARDS_BETWEEN_MERGES = 16
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ScanOptions:
    """How a scan is computed.

    Attributes:
        tags: names out of `TAG_NAMES`; each is a statistic. None = those of `DEFAULT_TAGS` that the tokenizer allows.
        max_tokens: cut documents there instead of at the model's own length, where that is longer.
        batch_tokens: how many tokens are computed at once; None = what suits the device.
        dtype: one of `attncap.models.DTYPES`.
        device: a torch device; "auto" takes the GPU where there is one.
        workers: shards computed at once; None = the CPU threads that torch has. Without influence on the result.
    """

    tags: tuple[str, ...] | None = None
    max_tokens: int | None = None
    batch_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    workers: int | None = None

    def __post_init__(self) -> None:
        tags = self.tags or ()
        for tag in tags:
            if tag not in TAG_NAMES:
                raise ValueError(f"tags: expected names out of {', '.join(TAG_NAMES)}, got {tag!r}")
            if tags.count(tag) > 1:
                raise ValueError(f"tags: expected each name once, got {tag} {tags.count(tag)} times")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name, low in (("max_tokens", 3), ("batch_tokens", 1), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")


DEFAULT_OPTIONS = ScanOptions()


def scan(
    model: str,
    corpus: Sequence[str],
    output: str | Path,
    *,
    spec: StatSpec = DEFAULT_SPEC,
    corpus_options: CorpusOptions = CorpusOptions(),  # noqa: B008 - frozen
    options: ScanOptions = DEFAULT_OPTIONS,
    progress: Progress | None = None,
) -> Run:
    """Capture a model's head statistics over a corpus; finish the run where it was stopped; verify a finished one.

    Args:
        model: a folder, an id on the Hugging Face hub, or ``builtin:minilm``.
        corpus: files, folders, globs, dataset ids, or ``builtin:docstrings``; see `Corpus`.
        output: the run's folder.
        spec: which statistics.

    Raises:
        CorpusError, ModelError: the input cannot be read.
        RunMismatchError: the folder holds another run, or no run at all.
        RunError: the folder is in use, or the disk is full; the same call goes on where it stopped.
        ScanError: the model failed on the corpus.
        MissingExtraError: an optional package is missing.
    """
    folder = RunFolder(Path(output))
    progress = progress or Progress()
    folder.check_usable()
    require("pyarrow", "scan")  # rather now than after the work
    documents = Corpus(corpus, corpus_options)
    device = _device(options.device)
    try:
        with folder.lock():
            folder.check_usable()
            loaded = load_model(model, dtype=options.dtype, device=str(device))
            _prepare(folder, documents, loaded, spec, options, device, progress).run()
    except OSError as error:
        reason, file = error.strerror or str(error), f" ({error.filename})" if error.filename else ""
        if error.errno not in _DISK_ERRORS:
            raise RunError(
                f"{output}: the scan cannot go on, {reason}{file}; when that is put right the same command goes on, "
                "or give another folder with -o"
            ) from error
        raise RunError(
            f"{output}: the disk is full ({reason}); make room and give the same command again, "
            "finished shards are kept"
        ) from error
    return read_run(output)


class _Scan:
    """One call of `scan`, once everything it needs is there and the folder is locked."""

    def __init__(
        self,
        folder: RunFolder,
        corpus: Corpus,
        loaded: LoadedModel,
        spec: StatSpec,
        options: ScanOptions,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._folder = folder
        self._corpus = corpus
        self._options = options
        self._progress = progress
        tags = tag_functions(loaded, options.tags, progress.message)
        check_capturable(loaded, spec, tags)
        progress.message(f"reading {', '.join(corpus.sources)}")
        self._survey = corpus.survey(SHARD_SIZE)
        self._shards = len(self._survey.shard_digests)
        self._total = Accumulator(histogram=True)
        self._counts: dict[str, int] = {}
        self._merged = 0  # shards that `_total` holds
        self._threads = torch.get_num_threads()
        limits = [limit for limit in (loaded.max_tokens, options.max_tokens) if limit is not None]
        batch_tokens = options.batch_tokens or _BATCH_TOKENS.get(device.type, _BATCH_TOKENS_ELSEWHERE)
        self._work = Work(loaded, spec, tags, min(limits, default=None), batch_tokens, device)
        self._plan = make_plan(self._work, corpus, self._survey, SHARD_SIZE)
        self._digest = hashlib.sha256(json.dumps(identity(self._plan), sort_keys=True).encode()).hexdigest()

    def run(self) -> None:
        """Do what is left to do."""
        with one_thread_per_operator():
            self._run()

    def _run(self) -> None:
        known = self._known()
        if known is not None:
            self._check_same(known)
            if self._is_finished(known):
                return
        if self._folder.is_read_only:
            raise RunError(f"{self._folder.path}: may not be written; check its permissions or give another folder -o")
        for message in self._survey.faults:
            self._progress.message(f"left out: {message}")
        done = self._finished_shards()
        self._write_scan(len(done))
        self._progress.start(self._survey.documents, sum(self._survey.shard_documents[shard] for shard in done))
        self._compute(done)
        self._finish(done)

    def _known(self) -> dict[str, Any] | None:
        """scan.json; None where there is none that can be believed."""
        try:
            return self._folder.read_scan()
        except RunDamagedError as error:
            if names_another(error.content, self._plan):
                raise RunMismatchError(
                    f"{self._folder.scan_json}: damaged, and it names another model or corpus; "
                    "remove it to compute this run in its place, or give another folder with -o"
                ) from error
            self._progress.message(
                f"{self._folder.scan_json}: damaged, it is made anew; finished shards of this run are kept"
            )
            return None

    def _is_finished(self, known: Mapping[str, Any]) -> bool:
        if known.get("status") != "complete":
            return False
        if self._folder.heads_are_intact(known):
            self._folder.remove_parts()
            self._progress.message(f"{self._folder.path}: complete and intact, nothing to do")
            return True
        self._progress.message(f"{self._folder.heads}: missing or damaged, it is computed again")
        return False

    def _check_same(self, known: Mapping[str, Any]) -> None:
        differing = differences(known, self._plan)
        if differing:
            raise RunMismatchError(
                f"{self._folder.path}: holds a run of something else: {'; '.join(differing)}. "
                "Give another folder with -o, or the command that began this one"
            )

    def _finished_shards(self) -> set[int]:
        """Take up what an earlier scan has left; gives the shards that need no work."""
        merged = self._folder.read_merged(self._merged_digest)
        if merged is not None:
            self._total, self._counts = Accumulator.from_bytes(merged.payload), merged.counts
            self._merged = merged.shard
            self._folder.remove_parts_before(self._merged)
        elif self._folder.merged.exists():
            self._progress.message(f"{self._folder.merged}: damaged, or of another run: what it held is computed again")
        done = set(range(self._merged))
        for shard in range(self._merged, self._shards):
            if self._folder.read_part(shard, self._part_digest(shard)) is not None:
                done.add(shard)
            elif self._folder.part_path(shard).exists():
                self._progress.message(
                    f"{self._folder.part_path(shard)}: damaged, or of another run: it is computed again"
                )
        if done:
            self._progress.message(f"{self._folder.path}: going on after {len(done)} of {self._shards} shards")
        return done

    def _compute(self, done: set[int]) -> None:
        """Compute the shards that are not done."""

        def keep(result: ShardResult) -> None:
            digest = self._part_digest(result.index)
            self._folder.write_part(Part(result.index, digest, result.counts, result.accumulator.to_bytes()))
            done.add(result.index)
            self._merge(done)
            self._write_scan(len(done))

        left = self._shards - len(done)
        if not left:
            return
        workers = 1 if self._work.device.type != "cpu" else self._options.workers or self._threads
        done_before = frozenset(done)
        shards = self._corpus.shards(self._survey, SHARD_SIZE, done_before)
        run_shards(self._work, shards, min(workers, left), keep, self._progress.advance)

    def _merge(self, done: set[int]) -> None:
        """Merge the shards that are next in order; now and then keep the sum in place of its shards."""
        while self._merged in done:
            part = self._folder.read_part(self._merged, self._part_digest(self._merged))
            if part is None:
                path = self._folder.part_path(self._merged)
                raise RunError(f"{path}: damaged since it was written; the same command computes it again")
            self._total.merge(Accumulator.from_bytes(part.payload))
            for name, count in part.counts.items():
                self._counts[name] = self._counts.get(name, 0) + count
            self._merged += 1
            if self._merged % _SHARDS_BETWEEN_MERGES == 0:
                digest = self._merged_digest(self._merged)
                self._folder.write_merged(Part(self._merged, digest, self._counts, self._total.to_bytes()))

    def _finish(self, done: set[int]) -> None:
        """Replace the shards by heads.parquet."""
        self._merge(done)
        counts = dict(self._counts)
        counts["empty_documents"] += self._survey.empty
        counts["failed_documents"] = self._survey.failed
        counts["nonfinite_rows"] = self._total.nonfinite_rows()
        digest = self._folder.write_heads([asdict(row) for row in self._total.rows()])
        self._write_scan(self._shards, status="complete", counts=counts, heads_sha256=digest)
        self._folder.remove_parts()

    def _write_scan(self, done: int, **changes: Any) -> None:
        progress = {"shards_done": done, "shards_total": self._shards}
        self._folder.write_scan({**self._plan, "progress": progress, **changes})

    def _part_digest(self, shard: int) -> str:
        return hashlib.sha256(self._digest.encode() + self._survey.shard_digests[shard]).hexdigest()

    def _merged_digest(self, shards: int) -> str:
        """What the summary of the first `shards` shards is made from."""
        return hashlib.sha256(
            b"".join((b"merged", self._digest.encode(), *self._survey.shard_digests[:shards]))
        ).hexdigest()


def _prepare(
    folder: RunFolder,
    corpus: Corpus,
    loaded: LoadedModel,
    spec: StatSpec,
    options: ScanOptions,
    device: torch.device,
    progress: Progress,
) -> _Scan:
    """The scan, or why there can be none."""
    try:
        return _Scan(folder, corpus, loaded, spec, options, device, progress)
    except AttncapError:
        raise
    except (TypeError, ValueError) as error:
        raise ModelError(f"{loaded.name}: cannot be scanned with these options ({error})") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device
