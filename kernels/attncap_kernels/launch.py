"""Runs the Triton kernels for a call: the forward, and the passes that some statistics need after it.

Nothing here waits for the device, so a call that has run once can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from attncap.types import HeadStats
from attncap.validation import Call, Extras
from attncap_kernels import plans
from attncap_kernels.call import TritonCall, offsets_on
from attncap_kernels.forward import attention_forward
from attncap_kernels.merge import merge_parts
from attncap_kernels.received import received_mass
from attncap_kernels.records import Lists, Outputs, Plan, array
from attncap_kernels.topk import list_candidates, select_candidates

TAGS_AT_ONCE = 2
FEATURES_AT_ONCE = 4
LIST_BYTES = 1 << 28  # lists of candidates are made for as many heads at a time as this holds


def attention(given: Call, out: Tensor, stats: HeadStats) -> None:
    """Fill `out` and `stats`.

    Args:
        out: (B, H, Q, E), any strides; stats: contiguous tensors of what the call asks for.
    """
    if out.numel() == 0 and stats.lse.numel() == 0:
        return
    call = TritonCall(**vars(given))
    guard = torch.cuda.device(call.query.device) if call.query.is_cuda else contextlib.nullcontext()
    with guard:
        later = _Later.of(call)
        for step, chunk in enumerate(_chunks(call.extras)):
            _forward(call, chunk, out, stats, later, everything=step == 0)
        if call.spec.topk:
            _topk(call, later, stats)
        if call.spec.received:
            _received(call, later, stats)


@dataclass(frozen=True)
class _Later:
    """What the forward leaves for later passes: each row's maximum, its sum, and a bound for its top k."""

    peak: Tensor | None
    total: Tensor | None
    bound: Tensor | None

    @classmethod
    def of(cls, call: TritonCall) -> _Later:
        rows = call.query.shape[:3]
        new = functools.partial(call.query.new_empty, dtype=torch.float32)
        wanted = call.spec.topk > 0 or call.spec.received
        return cls(
            new(rows) if wanted else None, new(rows) if wanted else None, new(rows) if call.spec.topk > 0 else None
        )


def _chunks(extras: Extras) -> list[tuple[slice, slice]]:
    """(tags, features) of each forward: a program holds few of them at a time."""
    tags = 0 if extras.query_tags is None else extras.query_tags.shape[0]
    features = 0 if extras.key_features is None else extras.key_features.shape[-1]
    steps = max(1, -(-tags // TAGS_AT_ONCE), -(-features // FEATURES_AT_ONCE))
    return [
        (
            slice(step * TAGS_AT_ONCE, min(tags, (step + 1) * TAGS_AT_ONCE)),
            slice(step * FEATURES_AT_ONCE, min(features, (step + 1) * FEATURES_AT_ONCE)),
        )
        for step in range(steps)
    ]


def _forward(
    call: TritonCall, chunk: tuple[slice, slice], out: Tensor, stats: HeadStats, later: _Later, *, everything: bool
) -> None:
    """One walk over the keys. Beyond the first, a walk is for more tags and features alone."""
    tags, features = (max(0, part.stop - part.start) for part in chunk)
    extras = call.extras
    part_of_extras = replace(
        extras,
        query_tags=extras.query_tags[chunk[0]] if extras.query_tags is not None and tags else None,
        key_tags=extras.key_tags[chunk[0]] if extras.key_tags is not None and tags else None,
        key_features=extras.key_features[..., chunk[1]] if extras.key_features is not None and features else None,
    )
    call = replace(call, extras=part_of_extras)
    new = functools.partial(call.query.new_empty, dtype=torch.float32)
    rows = tuple(call.query.shape[:3])
    tag_mass = _piece(stats.tag_mass, chunk[0], new, rows)
    feature_mass = _piece(stats.feature_mass, chunk[1], new, rows)
    wanted = stats if everything else HeadStats(lse=new(rows))
    outputs = Outputs(
        array(out),
        *(wanted.lse, wanted.max_logit, wanted.entropy, wanted.collision, wanted.distance, wanted.sink_mass),
        *(wanted.diagonal_mass, wanted.null_mass, wanted.offset_mass),
        offsets_on(call.spec.offsets, call.query.device) if wanted.offset_mass is not None else None,
        tag_mass if tags else None,
        feature_mass if features else None,
        *((later.peak, later.total, later.bound) if everything else (None, None, None)),
    )
    _run_forward(call, outputs, tags, features, call.spec.topk if everything else 0)
    for whole, piece, part in ((stats.tag_mass, tag_mass, chunk[0]), (stats.feature_mass, feature_mass, chunk[1])):
        if whole is not None and piece is not None and piece is not whole:
            whole[..., part] = piece


def _piece(whole: Tensor | None, part: slice, new: Any, rows: tuple[int, ...]) -> Tensor | None:
    """Where a part of the last dimension of `whole` is written: itself if the part is all of it."""
    if whole is None or part.stop <= part.start:
        return None
    return whole if part.stop - part.start == whole.shape[-1] else new((*rows, part.stop - part.start))


def _run_forward(call: TritonCall, outputs: Outputs, tags: int, features: int, topk: int) -> None:
    group = call.group
    longest_rows, longest_keys = call.longest
    tiles = call.tiles(longest_rows * group, topk, tags=tags + features > 0)
    blocks, table = call.blocks(tiles.rows, group=group)
    programs = blocks * (call.heads // group)
    parts = plans.parts_for(programs, longest_keys, tiles)
    plan = call.plan(
        tiles,
        GROUP=group,
        PARTS=parts,
        OFFSETS=0 if outputs.offset_mass is None else len(call.spec.offsets),
        TAGS=tags,
        FEATURES=features,
        TOPK=topk,
        CLASSES=plans.classes_for(topk, tiles.keys) if topk else 1,
    )
    inputs = call.inputs(table)
    written = _part_outputs(outputs, call, plan, parts) if parts > 1 else outputs
    sign, scale, softcap = call.numbers
    rows, keys, offset = call.lengths
    left, right = call.window
    total_rows = call.query.shape[2]
    attention_forward[(programs, parts)](
        inputs, written, sign, scale, softcap, blocks if call.packed else rows, keys, offset, total_rows, left, right,
        *call.band, P=plan, **tiles.options,
    )  # fmt: skip
    if parts > 1:
        merge_parts[(inputs.part_rows,)](
            inputs, written, outputs, sign, scale, softcap, total_rows, PAD_PARTS=triton.next_power_of_2(parts), P=plan,
            num_warps=4,
        )  # fmt: skip


def _part_outputs(outputs: Outputs, call: TritonCall, plan: Plan, parts: int) -> Outputs:
    """Memory for what programs write that see a part of the keys."""
    rows = (parts, *call.query.shape[:3])

    def new(*last: int) -> Tensor:
        return call.query.new_empty((*rows, *last), dtype=torch.float32)

    def like(statistic: Tensor | None) -> Tensor | None:
        return None if statistic is None else new(*statistic.shape[len(outputs.lse.shape) :])

    masses = {"distance", "sink_mass", "diagonal_mass", "offset_mass", "tag_mass", "feature_mass"}
    given = {name: like(getattr(outputs, name)) for name in masses | {"entropy", "collision"}}
    return outputs._replace(
        out=new(call.value.shape[-1]),
        peak=new(),
        total=new(),
        bound=new(plan.CLASSES.value) if plan.TOPK.value else None,
        max_logit=None,
        null_mass=None,
        **given,
    )


def _topk(call: TritonCall, later: _Later, stats: HeadStats) -> None:
    """List the keys that reach the bound and select, for as many heads at a time as memory for lists goes."""
    topk, group, total_rows = call.spec.topk, call.group, call.query.shape[2]
    longest_rows, longest_keys = call.longest
    tiles = call.tiles(longest_rows * group, topk, later=True)
    selecting = plans.selecting_tiles(tiles, call.pad, call.query.dtype)
    capacity, words = plans.capacity_for(topk), tiles.keys // 32
    heads = call.query.shape[0] * call.heads
    row_bytes = 4 * capacity * (words + 1)
    at_once = max(1, min(heads, LIST_BYTES // (row_bytes * max(1, total_rows))) // group) * group

    blocks, table = call.blocks(tiles.rows, group=group)
    few, few_table = call.blocks(selecting.rows, group=group)
    each = 1 if call.packed else call.query.shape[0]  # blocks are counted over all batch entries
    parts = plans.parts_for(blocks // each * at_once // group, longest_keys, tiles)
    new = functools.partial(call.query.new_empty, dtype=torch.int32)
    list_rows = at_once * total_rows
    lists = Lists(new((parts, list_rows)), new((parts, list_rows, capacity)), new((parts, list_rows, capacity, words)))
    plan = call.plan(tiles, GROUP=group, PARTS=parts, TOPK=topk)
    few_plan = call.plan(selecting, GROUP=group, TOPK=topk)
    rows, keys, offset = call.lengths
    for first in range(0, heads, at_once):
        groups = min(at_once, heads - first) // group
        list_candidates[(groups * (blocks // each), parts)](
            call.inputs(table), later.bound, lists, first // group * (blocks // each), first * total_rows, list_rows,
            *call.numbers, blocks if call.packed else rows, keys, offset, total_rows, *call.window, CAPACITY=capacity,
            P=plan, **tiles.options,
        )  # fmt: skip
        select_candidates[(groups * (few // each),)](
            call.inputs(few_table), later.bound, lists, later.peak, later.total, stats.topk_prob, stats.topk_index,
            first // group * (few // each), first * total_rows, list_rows, *call.numbers,
            few if call.packed else rows, keys, offset, total_rows, *call.window, LISTS=parts, CAPACITY=capacity,
            WORDS=words, LIMIT=plans.most_listed(topk), KEPT=triton.next_power_of_2(topk), P=few_plan,
            **selecting.options,
        )  # fmt: skip


def _received(call: TritonCall, later: _Later, stats: HeadStats) -> None:
    """Sum over rows, key by key."""
    (left, right), (sign, scale, softcap) = call.window, call.numbers
    rows, keys, offset = call.lengths
    tiles = call.tiles(call.longest[0], later=True)
    blocks, table = call.blocks(tiles.keys, of_keys=True)
    received_mass[(blocks * call.heads,)](
        call.inputs(table), stats.received_mass, later.peak, later.total, sign, scale, softcap, rows,
        blocks if call.packed else keys, offset, call.query.shape[2], call.key.shape[2], left, right,
        P=call.plan(tiles), **tiles.options,
    )  # fmt: skip
