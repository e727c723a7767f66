"""An Accumulator as bytes and back: a magic line, a digest, a JSON description, then the arrays one after another.

Nothing here depends on a clock, on a compressor's version or on pickle, so equal contents give equal bytes and a
damaged file is noticed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attncap.accumulate import Accumulator, canonical_order
from attncap.moments import Moments

_MAGIC = b"attncap accumulator 1\n"
_DIGEST = 32
_FLOATS = ("mean", "m2", "low", "high")
_INTEGERS = ("count", "nonfinite")


def dump(accumulator: Accumulator) -> bytes:
    """See `Accumulator.to_bytes`. Histograms are mostly empty: only the bins that are used are written."""
    entries: list[dict[str, Any]] = []
    arrays: list[bytes] = []
    for module, groups in accumulator._moments.items():
        for group in sorted(groups):
            for stat in canonical_order(set(groups[group])):
                moments = groups[group][stat]
                entry: dict[str, Any] = {"module": module, "group": group, "stat": stat}
                arrays += [getattr(moments, name).cpu().numpy().astype("<i8").tobytes() for name in _INTEGERS]
                arrays += [getattr(moments, name).cpu().numpy().astype("<f8").tobytes() for name in _FLOATS]
                if moments.bins is not None:
                    flat = moments.bins.cpu().numpy().reshape(-1)
                    used = np.flatnonzero(flat)
                    entry |= {"bins": moments.bins.shape[1], "used": int(used.size)}
                    arrays += [used.astype("<i8").tobytes(), flat[used].astype("<i8").tobytes()]
                entries.append(entry)
    head = {
        "histogram": accumulator.histogram,
        "heads": dict(zip(accumulator.modules, accumulator.heads, strict=True)),
        "entries": entries,
    }
    description = json.dumps(head, ensure_ascii=True, separators=(",", ":")).encode()
    body = len(description).to_bytes(8, "little") + description + b"".join(arrays)
    return _MAGIC + hashlib.sha256(body).digest() + body


def load(data: bytes) -> Accumulator:
    """See `Accumulator.from_bytes`."""
    start = len(_MAGIC) + _DIGEST
    if data[: len(_MAGIC)] != _MAGIC:
        raise ValueError("data: expected what Accumulator.to_bytes wrote, got something else")
    body = data[start:]
    if hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
        raise ValueError("data: damaged, the digest of the accumulator does not match")
    size = int.from_bytes(body[:8], "little")
    head = json.loads(body[8 : 8 + size])
    accumulator = Accumulator(histogram=head["histogram"])
    accumulator._heads = dict(head["heads"])
    arrays = np.frombuffer(body[8 + size :], dtype="<i8")
    place = 0

    def take(count: int) -> NDArray[np.int64]:
        nonlocal place
        place += count
        return arrays[place - count : place]

    for entry in head["entries"]:
        heads = accumulator._heads[entry["module"]]
        fields: dict[str, torch.Tensor] = {name: torch.tensor(take(heads)) for name in _INTEGERS}
        fields |= {name: torch.tensor(take(heads).view("<f8")) for name in _FLOATS}
        if "bins" in entry:
            bins = np.zeros(heads * entry["bins"], dtype=np.int64)
            used = take(entry["used"])
            bins[used] = take(entry["used"])
            fields["bins"] = torch.from_numpy(bins.reshape(heads, entry["bins"]))
        groups = accumulator._moments.setdefault(entry["module"], {})
        groups.setdefault(entry["group"], {})[entry["stat"]] = Moments(**fields)
    return accumulator
