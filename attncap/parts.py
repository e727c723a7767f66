"""Files that are whole or not there: how they are written, and how a part of a run is known to be what was written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"
_PART_MAGIC = b"attncap part 1\n"
_LONGEST_HEADER = 1 << 16


@dataclass(frozen=True)
class Part:
    """A summary on disk: that of one shard, or the merged one of all shards before `shard`."""

    shard: int
    digest: str  # of what went in: the run's identity and the documents
    counts: dict[str, int]
    payload: bytes  # an accumulator's bytes

    def to_bytes(self) -> bytes:
        """magic, sha256 of the rest, length of the header, header as JSON, payload compressed."""
        fields = {"shard": self.shard, "digest": self.digest, "counts": self.counts}
        header = json.dumps(fields, sort_keys=True).encode()
        body = struct.pack("<Q", len(header)) + header + zlib.compress(self.payload, 1)
        return _PART_MAGIC + hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Part | None:
        """The part, or None where the bytes are not one, whole and unchanged."""
        start = len(_PART_MAGIC) + 32
        body = data[start:]
        if data[: len(_PART_MAGIC)] != _PART_MAGIC or hashlib.sha256(body).digest() != data[len(_PART_MAGIC) : start]:
            return None
        (length,) = struct.unpack_from("<Q", body)
        header = json.loads(body[8 : 8 + length])
        return cls(header["shard"], header["digest"], header["counts"], zlib.decompress(body[8 + length :]))

    @classmethod
    def read(cls, path: Path) -> Part | None:
        """The part in a file; None where there is none, or it is damaged."""
        try:
            return cls.from_bytes(path.read_bytes())
        except FileNotFoundError:
            return None

    @staticmethod
    def shard_of(handle: BinaryIO) -> int:
        """The number at the head of a part's file, unverified; 0 where there is none."""
        start = handle.read(len(_PART_MAGIC) + 32 + 8)
        if len(start) < len(_PART_MAGIC) + 40 or not start.startswith(_PART_MAGIC):
            return 0
        (length,) = struct.unpack("<Q", start[-8:])
        try:
            return int(json.loads(handle.read(min(length, _LONGEST_HEADER)))["shard"])
        except (ValueError, KeyError, TypeError):
            return 0


def write_whole(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file so that after any crash it holds the old bytes or the new ones, never a mixture.

    Args:
        durable: whether it must outlive a failure of the machine, as against one of the process.
    """
    with whole_file(path, durable) as temporary, open(temporary, "wb") as handle:
        handle.write(data)


@contextlib.contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path; what the block wrote there takes the place of `path` at its end."""
    # Two workers may write one file at once; each writes a temporary of its own, and the last to rename it wins.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}{TEMPORARY}")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        _sync_folder(path.parent)


def digest_of_file(path: Path) -> str:
    """sha256 of a file that may be larger than the memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
