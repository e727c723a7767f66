"""`scan`: head statistics of a model over a corpus, into a run folder that can be stopped and resumed at will.

The corpus is cut into shards of a fixed number of documents. Each shard's summary is a file; the end merges them in
order. What a run holds therefore depends on the model, the corpus and the options, and on nothing else.

Any number of workers may share a run: torchrun or Slurm starts the same command several times. Each computes its share
of the shards, then whatever no other worker has claimed, and whoever finds all of them done merges them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from attncap.claims import Claims, find_place
from attncap.corpus import Corpus, CorpusError, CorpusOptions, ShardSize, Survey
from attncap.extras import require
from attncap.ledger import Ledger, Merged, PartDamagedError
from attncap.models import LoadedModel, ModelError, checked_name, choose_device, load_model
from attncap.options import ScanOptions, check_arguments
from attncap.parts import Part
from attncap.plan import check_capturable, differences, identity, make_plan, names_another, tag_functions
from attncap.progress import Progress, plural
from attncap.shards import ShardResult, Work, follow, one_thread_per_operator, run_shards
from attncap.store import Run, RunDamagedError, RunError, RunFolder, RunMismatchError, read_run
from attncap.tables import estimated_bytes, write_table
from attncap.team import BEGIN, Team
from attncap.types import AttncapError, StatSpec
from attncap.workers import WorkerNote

SHARD_SIZE = ShardSize()
SHARD_SIZE_ELSEWHERE = ShardSize(documents=8192, characters=2 * 1024 * 1024)
"""A shard is what a kill costs at most, per worker: seconds of a CPU's core or a GPU. Part of what a run is."""

DEFAULT_SPEC = StatSpec(offsets=(-1, 1), distance=True, collision=True, received=True)

# Small batches stay in a core's cache and hold documents of nearly one length; a GPU wants more at once.
_BATCH_TOKENS = {"cpu": 1024}
_BATCH_TOKENS_ELSEWHERE = 16384

_SHARDS_BETWEEN_MERGES = 16
_TOKENS_OF_A_DOCUMENT = 2048  # for an estimate, where nothing cuts it
_SECONDS_BETWEEN_LOOKS = 0.2  # while other workers have what is left

# What is claimed: to be the one who sets a run up, to be the one who merges, and each shard.
_SETUP, _MERGING, _FIRST_SHARD = range(3)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


DEFAULT_OPTIONS = ScanOptions()


def scan(
    model: str | os.PathLike[str],
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
        TypeError, ValueError: an argument is not what it should be.
        CorpusError, ModelError: the input cannot be read.
        RunMismatchError: the folder holds another run, or no run at all.
        RunError: the folder is in use, or the disk is full; the same call goes on where it stopped.
        ScanError: the model failed on the corpus.
        MissingExtraError: an optional package is missing.
    """
    model = checked_name(model)
    check_arguments(spec, corpus_options, options)
    folder = RunFolder(Path(output))
    progress = progress or Progress()
    folder.check_usable()
    require("pyarrow", "scan")  # rather now than after the work
    documents = Corpus(corpus, corpus_options)
    place = find_place()
    device = choose_device(options.device, place.local_rank)
    try:
        with Team(place, options.tensor_parallel) as team, ExitStack() as undo:
            claims = None
            if team.rank == 0:
                undo.enter_context(folder.lock(shared=place.launched))
                folder.check_usable()
                team.tell(BEGIN)
                claims = None if folder.is_read_only else undo.enter_context(closing(folder.claims()))
            else:
                team.hear()
            with team.step():
                loaded = load_model(model, options.dtype, str(device), options.model, tensor_parallel=team.size)
                prepared = _prepare(folder, documents, loaded, spec, options, device, progress, team, claims)
            prepared.run() if team.rank == 0 else prepared.follow()
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
    """One worker's part of a scan, once everything it needs is there and the folder is locked."""

    def __init__(
        self,
        folder: RunFolder,
        corpus: Corpus,
        loaded: LoadedModel,
        spec: StatSpec,
        options: ScanOptions,
        device: torch.device,
        progress: Progress,
        team: Team,
        claims: Claims | None,
    ) -> None:
        self._folder = folder
        self._corpus = corpus
        self._options = options
        self._progress = progress
        self._place = team.place
        self._claims = claims
        tags = tag_functions(loaded, options.tags, progress.message)
        check_capturable(loaded, spec, tags)
        device = loaded.device if options.model or team.size > 1 else device
        self._size = SHARD_SIZE if device.type == "cpu" else SHARD_SIZE_ELSEWHERE
        if (characters := options.shard_characters) is not None:
            documents = max(1, characters * self._size.documents // self._size.characters)
            self._size = replace(self._size, characters=characters, documents=documents)
        self._threads = torch.get_num_threads()
        limits = [limit for limit in (loaded.max_tokens, options.max_tokens) if limit is not None]
        batch_tokens = options.batch_tokens or _BATCH_TOKENS.get(device.type, _BATCH_TOKENS_ELSEWHERE)
        longest, keep = min(limits, default=None), tuple(dict.fromkeys(options.keep))
        self._work = Work(loaded, spec, tags, longest, batch_tokens, device, keep, self._leave_out, team)

    def follow(self) -> None:
        """Compute what the leader of the team says."""
        follow(self._work)

    def run(self) -> None:
        """Do what is left to do, beside the other workers of the run if there are any."""
        with one_thread_per_operator():
            with self._alone(_SETUP):
                if self._begin():
                    return
            assert self._claims is not None
            with WorkerNote(self._folder, self._place, self._claims, self._progress) as self._note:
                while not self._is_complete():
                    if not self._compute() and not self._finish():
                        time.sleep(_SECONDS_BETWEEN_LOOKS)
            self._folder.remove_parts()  # the notes of workers that came as the run was finished

    def _begin(self) -> bool:
        """Find out what there is to do and write it down; gives whether the run is finished already."""
        self._survey = self._look_through(self._known())
        self._shards = len(self._survey.shard_digests)
        self._plan = make_plan(self._work, self._corpus, self._survey, self._size, self._options.model)
        digest = hashlib.sha256(json.dumps(identity(self._plan), sort_keys=True).encode()).hexdigest()
        self._ledger = Ledger(self._folder, digest, self._survey.shard_digests, self._work.keep, self._progress.message)
        with self._alone(_MERGING):  # another worker may have finished the run meanwhile
            known = self._known()
            self._check(known)
            if known is not None and self._is_finished(known):
                return True
            if self._claims is None:
                raise RunError(f"{self._folder.path}: may not be written; check its permissions or give another -o")
            self._estimate()
            self._ledger.check()
            done = self._ledger.done()
            self._write_scan(len(done))
        self._say_faults()
        if done:
            self._progress.message(f"{self._folder.path}: going on after {len(done)} of {self._shards} shards")
        self._keep_survey()
        self._progress.start(self._survey.documents, self._documents_of(done))
        return False

    def _leave_out(self, fault: str) -> None:
        """What happens at a document that the model cannot read."""
        if self._corpus.options.on_error == "stop":
            raise CorpusError(f"{fault}; without --on-error stop such documents are left out and counted")
        self._progress.message(f"left out: {fault}")

    def _say_faults(self) -> None:
        for message in self._survey.faults:
            self._progress.message(f"left out: {message}")
        if self._survey.failed > len(self._survey.faults):
            self._progress.message(f"left out in all: {plural(self._survey.failed, 'document')} that cannot be read")

    def _estimate(self) -> None:
        """Say how large the tables of single documents become, and refuse where the disk is too small for them."""
        work, needed = self._work, 0
        for kind in work.keep:
            heads = work.loaded.layers * work.loaded.heads
            longest = work.max_tokens or _TOKENS_OF_A_DOCUMENT
            size = estimated_bytes(kind, self._survey.documents, longest, heads, work.spec, len(work.tags))
            needed += size
            self._progress.message(f"{self._folder.table(kind)}: about {max(1, size >> 20):,} MiB at most")
        free = shutil.disk_usage(self._folder.path).free
        if 2 * needed > free:  # the shards' shares, and the whole
            raise RunError(
                f"{self._folder.path}: --keep {','.join(work.keep)} may take {2 * needed >> 20:,} MiB while it is "
                f"written, and {free >> 20:,} MiB are free; give --limit, or a folder elsewhere with -o"
            )

    def _look_through(self, known: Mapping[str, Any] | None) -> Survey:
        """The survey of the corpus: an earlier one where no file has changed since, in a run that is not finished."""
        state = self._state()
        part = None if state is None or (known or {}).get("status") == "complete" else self._folder.read_survey(state)
        if part is not None:
            return Survey.from_bytes(part.payload)
        self._progress.message(f"reading {', '.join(self._corpus.sources)}")
        return self._corpus.survey(self._size)

    def _keep_survey(self) -> None:
        state = self._state()
        if state is not None and self._folder.read_survey(state) is None:
            self._folder.write_survey(Part(0, state, {}, self._survey.to_bytes()))

    def _state(self) -> str | None:
        """Of the corpus and where it is cut."""
        state = self._corpus.state()
        return None if state is None else f"2 {state} {json.dumps(asdict(self._size))}"

    def _known(self) -> dict[str, Any] | None:
        """scan.json; None where there is none that can be believed."""
        self._damage: RunDamagedError | None = None
        try:
            return self._folder.read_scan()
        except RunDamagedError as error:
            self._damage = error
            return None

    def _check(self, known: Mapping[str, Any] | None) -> None:
        """Refuse a folder that holds another run."""
        if self._damage is not None:
            if names_another(self._damage.content, self._plan):
                raise RunMismatchError(
                    f"{self._folder.scan_json}: damaged, and it names another model or corpus; "
                    "remove it to compute this run in its place, or give another folder with -o"
                ) from self._damage
            self._progress.message(
                f"{self._folder.scan_json}: damaged, it is made anew; finished shards of this run are kept"
            )
        differing = differences(known, self._plan) if known is not None else []
        if differing:
            raise RunMismatchError(
                f"{self._folder.path}: holds a run of something else: {'; '.join(differing)}. "
                "Give another folder with -o, or the command that began this one"
            )

    def _is_finished(self, known: Mapping[str, Any]) -> bool:
        if known.get("status") != "complete":
            return False
        if self._folder.heads_are_intact(known) and self._folder.tables_are_intact(known):
            self._folder.remove_parts()
            self._progress.message(f"{self._folder.path}: complete and intact, nothing to do")
            return True
        self._progress.message(f"{self._folder.path}: a table is missing or damaged, it is computed again")
        return False

    def _is_complete(self) -> bool:
        """Whether a worker has finished the run."""
        known = self._folder.read_scan()
        return known is not None and known.get("status") == "complete"

    def _compute(self) -> int:
        """Compute what no other worker has or does, first of the own share; gives the number of shards."""
        left = sorted(set(range(self._shards)) - self._ledger.done())
        share = [shard for shard in left if shard % self._place.size == self._place.rank]
        computed = 0
        for wanted in (share, left) if self._place.size > 1 else (left,):
            computed = computed or self._compute_among(wanted)
        return computed

    def _compute_among(self, wanted: Sequence[int]) -> int:
        assert self._claims is not None
        if not any(self._claim(shard) for shard in wanted):
            return 0
        computed = 0

        def keep(result: ShardResult) -> None:
            nonlocal computed
            computed += 1
            self._keep(result)

        # torch was told to take one thread an operator; `_threads` is what it had before.
        alone = self._work.device.type != "cpu" or self._work.loaded.is_placed or self._work.team.size > 1
        workers = 1 if alone else self._options.workers or self._threads
        shards = self._corpus.shards(self._survey, wanted, self._claim)
        run_shards(self._work, shards, min(workers, len(wanted)), keep, self._progress.advance)
        return computed

    def _claim(self, shard: int) -> bool:
        """Whether a shard is this worker's to compute; its own claims it has again."""
        assert self._claims is not None
        if not self._claims.take(shard + _FIRST_SHARD):
            return False
        if self._ledger.is_done(shard) or self._is_complete():
            self._claims.give_back(shard + _FIRST_SHARD)
            return False
        return True

    def _keep(self, result: ShardResult) -> None:
        assert self._claims is not None
        if self._is_complete():  # others did this shard too: a file system without locks
            return
        self._ledger.add(result)
        self._claims.give_back(result.index + _FIRST_SHARD)
        if not self._claims.take(_MERGING):
            return
        try:
            if self._is_complete():  # by another worker, since the claim on the shard was given back
                return
            self._ledger.merge(_SHARDS_BETWEEN_MERGES)
            done = self._ledger.done()
            self._write_scan(len(done))
            self._progress.reached(self._documents_of(done))
            self._note.write()
        finally:
            self._claims.give_back(_MERGING)

    def _finish(self) -> bool:
        """Replace the shards by heads.parquet, where all are there."""
        if len(self._ledger.done()) < self._shards:
            return False
        with self._alone(_MERGING):
            if self._is_complete():
                return True
            merged = self._ledger.merged()
            if merged.shards < self._shards:
                return False
            counts = dict(merged.counts)
            counts["empty_documents"] += self._survey.empty
            counts["failed_documents"] += self._survey.failed
            if counts["documents"] == 0:
                raise CorpusError(
                    f"{', '.join(self._corpus.sources)}: no document that {self._work.loaded.name} reads; "
                    f"{counts['failed_documents']} left out, {counts['empty_documents']} without a token"
                )
            counts["nonfinite_rows"] = merged.accumulator.nonfinite_rows()
            try:
                changes = {"tables_sha256": self._write_tables(merged)} if self._work.keep else {}
            except PartDamagedError:
                return False
            digest = self._folder.write_heads([asdict(row) for row in merged.accumulator.rows()])
            self._write_scan(self._shards, status="complete", counts=counts, heads_sha256=digest, **changes)
            self._folder.remove_parts()
            self._folder.remove_temporaries()
            return True

    def _write_tables(self, merged: Merged) -> dict[str, str]:
        """Put the tables of single documents together; gives the sha256 of each."""

        def write(kind: str, path: Path) -> None:
            write_table(path, self._ledger.tables(kind), merged.accumulator.modules)

        return {kind: self._folder.write_table(kind, functools.partial(write, kind)) for kind in self._work.keep}

    def _documents_of(self, shards: Iterable[int]) -> int:
        return sum(self._survey.shard_documents[shard] for shard in shards)

    def _write_scan(self, done: int, **changes: Any) -> None:
        progress = {"shards_done": done, "shards_total": self._shards}
        self._folder.write_scan({**self._plan, "progress": progress, **changes})

    def _alone(self, number: int) -> AbstractContextManager[None]:
        return nullcontext() if self._claims is None else self._claims.alone(number)


def _prepare(
    folder: RunFolder,
    corpus: Corpus,
    loaded: LoadedModel,
    spec: StatSpec,
    options: ScanOptions,
    device: torch.device,
    progress: Progress,
    team: Team,
    claims: Claims | None,
) -> _Scan:
    """The scan, or why there can be none."""
    try:
        return _Scan(folder, corpus, loaded, spec, options, device, progress, team, claims)
    except AttncapError:
        raise
    except (TypeError, ValueError) as error:
        raise ModelError(f"{loaded.name}: cannot be scanned with these options ({error})") from error
