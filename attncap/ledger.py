"""Which shards of a run are done, and their sum: the same answer for every worker, read from the run's folder.

A shard is done when its file is there or the merged summary holds it. The merged summary is made in the order of the
shards, by whichever worker has the claim on it, so it is the same bytes whoever makes it and however often it is taken
up again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attncap.accumulate import Accumulator
from attncap.parts import Part
from attncap.shards import ShardResult
from attncap.store import RunFolder


class PartDamagedError(Exception):
    """A part of a run is not what was written."""


@dataclass
class Merged:
    """Sum of the first `shards` shards."""

    shards: int = 0
    accumulator: Accumulator = field(default_factory=lambda: Accumulator(histogram=True))
    counts: dict[str, int] = field(default_factory=dict)


class Ledger:
    """The finished shards of one run.

    Args:
        folder: where they lie.
        identity: digest of what makes the run the run it is.
        shard_digests: one digest of the documents of each shard.
        keep: kinds of tables that a shard has beside its summary.
        say: told about what was found damaged.
    """

    def __init__(
        self,
        folder: RunFolder,
        identity: str,
        shard_digests: Sequence[bytes],
        keep: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._identity = identity.encode()
        self._shard_digests = shard_digests
        self._keep = keep
        self._say = say

    def check(self) -> None:
        """Drop what earlier scans left that is damaged or of another run, so that the rest may be believed."""
        merged = self._folder.read_merged(self._merged_digest)
        if merged is None and self._folder.merged.exists():
            self._drop(self._folder.merged, "what it held is computed again")
        first = 0 if merged is None else merged.shard
        self._folder.remove_parts_before(first)
        for shard in sorted(self._folder.finished_shards()):
            known = shard < len(self._shard_digests)
            if shard >= first and not (known and self._folder.read_part(shard, self._part_digest(shard))):
                self._drop(self._folder.part_path(shard), "it is computed again")

    def done(self) -> set[int]:
        """The shards that need no work."""
        done = self._folder.finished_shards()
        for kind in self._keep:
            done &= self._folder.shards_with_table(kind)
        return done

    def is_done(self, shard: int) -> bool:
        """Whether a shard needs no work."""
        if not all(self._folder.table_part_path(kind, shard).exists() for kind in self._keep):
            return False
        return self._folder.part_path(shard).exists() or shard < self._folder.merged_shards()

    def add(self, result: ShardResult) -> None:
        """Keep the result of a shard; its summary last, which says that the rest is there."""
        digest = self._part_digest(result.index)
        for kind in self._keep:
            self._folder.write_table_part(kind, Part(result.index, digest, {}, result.tables[kind]))
        self._folder.write_part(Part(result.index, digest, result.counts, result.accumulator.to_bytes()))

    def merge(self, at_least: int) -> None:
        """Replace the shards next in order by their sum, where there are so many; needs the claim on merging."""
        following = self._following()
        if following >= at_least:
            merged = self.merged()
            digest, payload = self._merged_digest(merged.shards), merged.accumulator.to_bytes()
            self._folder.write_merged(Part(merged.shards, digest, merged.counts, payload))

    def merged(self) -> Merged:
        """The sum of all finished shards from the first on without a gap; needs the claim on merging.

        It ends before a shard that was damaged since it was written, which is dropped.
        """
        merged = Merged()
        part = self._folder.read_merged(self._merged_digest)
        if part is not None:
            merged = Merged(part.shard, Accumulator.from_bytes(part.payload), dict(part.counts))
        elif self._folder.merged.exists():
            self._drop(self._folder.merged, "what it held is computed again")
        while merged.shards < len(self._shard_digests):
            path = self._folder.part_path(merged.shards)
            part = self._folder.read_part(merged.shards, self._part_digest(merged.shards))
            if part is None:
                if path.exists():
                    self._drop(path, "it is computed again")
                break
            merged.accumulator.merge(Accumulator.from_bytes(part.payload))
            for name, count in part.counts.items():
                merged.counts[name] = merged.counts.get(name, 0) + count
            merged.shards += 1
        return merged

    def tables(self, kind: str) -> Iterator[bytes]:
        """The shares of a table in the order of the shards.

        Raises:
            PartDamagedError: one was damaged since it was written; it was dropped, and its shard is no longer done.
        """
        for shard in range(len(self._shard_digests)):
            part = self._folder.read_table_part(kind, shard, self._part_digest(shard))
            if part is None:
                self._drop(self._folder.table_part_path(kind, shard), "it is computed again")
                raise PartDamagedError
            yield part.payload

    def _following(self) -> int:
        """How many shards after the merged ones are there without a gap."""
        first = shard = self._folder.merged_shards()
        while self._folder.part_path(shard).exists():
            shard += 1
        return shard - first

    def _drop(self, path: Path, so: str) -> None:
        self._say(f"{path}: damaged, or of another run: {so}")
        path.unlink(missing_ok=True)

    def _part_digest(self, shard: int) -> str:
        return hashlib.sha256(self._identity + self._shard_digests[shard]).hexdigest()

    def _merged_digest(self, shards: int) -> str:
        """What the summary of the first `shards` shards is made from."""
        return hashlib.sha256(b"".join((b"merged", self._identity, *self._shard_digests[:shards]))).hexdigest()
