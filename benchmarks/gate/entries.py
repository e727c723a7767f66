"""What the gate compiles: head dims and dtypes x statistics x GPU architectures, each as a call of the launcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attncap import StatSpec

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DIMS = (16, 32, 64, 128, 256)
DTYPES = ("bfloat16", "float16", "float32")

BACKWARD_ARCHS, LEAST_BACKWARD_DIM = ("sm_80", "sm_90"), 32

# Backwards of the output alone, and of it with statistics.
BACKWARD, BACKWARD_FEW, BACKWARD_EVERYTHING = "backward", "backward of few", "backward of everything"
NONE, FEW, DEFAULT, EVERYTHING, ANNOTATED, DECODING = (
    "none",
    "few",
    "default",
    "everything",
    "tags and features",
    "decoding",
)
SPECS = {
    NONE: StatSpec.none(),
    FEW: StatSpec(topk=0, offsets=(-1,)),
    DEFAULT: StatSpec(),
    EVERYTHING: StatSpec.all(),
    ANNOTATED: StatSpec(topk=0, offsets=(-1,)),
    DECODING: StatSpec.all(),
    BACKWARD: StatSpec.none(),
    BACKWARD_FEW: StatSpec(topk=0, offsets=(-1,)),
    BACKWARD_EVERYTHING: StatSpec.all(),
}
STATISTICS = tuple(SPECS)


@dataclass(frozen=True)
class Group:
    """Entries that share tensors: they are compiled in one process."""

    arch: str
    dtype: str
    dim: int

    def name(self, statistics: str) -> str:
        """As an entry stands in the table and in budgets.json."""
        return f"{self.arch} {self.dtype} D {self.dim} {statistics}"

    def among(self, statistics: Sequence[str]) -> tuple[str, ...]:
        """Those that the table has for the group: backwards are held to budgets where models are trained with them."""
        has_backwards = self.arch in BACKWARD_ARCHS and self.dim >= LEAST_BACKWARD_DIM
        return tuple(name for name in statistics if has_backwards or not name.startswith(BACKWARD))


def run_launcher(group: Group, statistics: str) -> None:
    """Make the launcher run every kernel of one entry: a long causal call or its backward, or one row on many keys."""
    from attncap_kernels import launch, launch_backward

    from attncap import ops, validation

    rows, keys, heads, key_heads = (1, 65536, 32, 8) if statistics == DECODING else (16384, 16384, 8, 8)
    dtype = getattr(torch, group.dtype)
    query = torch.empty(1, heads, rows, group.dim, dtype=dtype)
    key, value = (torch.empty(1, key_heads, keys, group.dim, dtype=dtype) for _ in range(2))
    spec = SPECS[statistics]
    options = validation.check_options(
        causal=True, scale=None, window=None, softcap=None, query_offset=None, head_dim=group.dim
    )
    extras = validation.check_extras(query, key, **_extras(statistics, rows, keys))
    out, stats = ops._dense_outputs(query, key, value, spec, extras)
    sequences = [(0, 0, rows, 0, keys, keys - rows)]
    call = validation.Call(query, key, value, spec, options, extras, sequences, packed=False)
    if not statistics.startswith(BACKWARD):
        launch.attention(call, out, stats)
        return
    arrived = {} if spec == StatSpec.none() else {name: one for name, one in stats.items() if name != "topk_index"}
    gradients = validation.Gradients(query=query, key=key, value=value, key_features=extras.key_features)
    launch_backward.backward(call, out, stats, validation.Upstream(out=out, **arrived), gradients)


def _extras(statistics: str, rows: int, keys: int) -> dict[str, Any]:
    given: dict[str, Any] = dict.fromkeys(("attn_mask", "sink_logits", "query_tags", "key_tags", "key_features"))
    if statistics in (ANNOTATED, BACKWARD_EVERYTHING):
        given["query_tags"] = torch.zeros(2, 1, rows, dtype=torch.int64)
        given["key_tags"] = torch.zeros(2, 1, keys, dtype=torch.int64)
        given["key_features"] = torch.zeros(1, keys, 8)
    return given
