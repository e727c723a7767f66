"""Records that kernels take and pass on: tensors with their strides, numbers, and the plan a kernel is compiled for.

What is absent is None, and a kernel is compiled for what is None: statistics that are off cost nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton.language import constexpr

# Numbers that change from call to call: a kernel is not compiled anew for their being 1 or a multiple of 16.
LENGTHS = ["rows", "keys", "offset", "total_rows", "left", "right"]


class Array(NamedTuple):
    """A tensor of up to four dimensions: pointer, and strides in elements (0 for dimensions it does not have)."""

    ptr: Any
    s0: Any
    s1: Any
    s2: Any
    s3: Any


class Inputs(NamedTuple):
    """The tensors of a call, each an Array or None."""

    query: Any  # (B, H, Q, D)
    key: Any  # (B, G, K, D)
    value: Any  # (B, G, K, E)
    attn_mask: Any  # (B, H, Q, K)
    sink_logits: Any  # (H,)
    query_mask: Any  # (B, Q)
    query_tags: Any  # (T, B, Q) int64
    key_tags: Any  # (T, B, K) int64
    key_features: Any  # (B, K, F)
    heads: Any  # H
    key_heads: Any  # G
    sequences: Any  # of packed sequences: see rows.py
    tiles: Any
    part_rows: Any  # B * H * Q, how far apart the statistics of two parts of the keys are


class Numbers(NamedTuple):
    """The scalars of a call."""

    sign: Any  # of the scale; 0 where the scale is 0
    scale: Any  # its size (1 where the scale is 0)
    softcap: Any
    left: Any  # window, used where the plan has LEFT and RIGHT; a causal mask is right = 0
    right: Any
    sink: Any
    diagonal: Any


class Outputs(NamedTuple):
    """Where results go: `out` an Array, statistics pointers to contiguous (B, H, Q) or (B, H, Q, n), or None.

    Of programs that see a part of the keys, what they write is partial (merge.py), one block for each part.
    """

    out: Any
    lse: Any
    max_logit: Any
    entropy: Any
    collision: Any
    distance: Any
    sink_mass: Any
    diagonal_mass: Any
    null_mass: Any
    offset_mass: Any
    offsets: Any  # (O,) int32, the offsets themselves
    tag_mass: Any
    feature_mass: Any
    peak: Any  # (B, H, Q) largest x of the row (scores.py), for later passes
    total: Any  # (B, H, Q) sum of 2^t
    bound: Any  # (B, H, Q) lower bound of the k-th largest x, or the (B, H, Q, C) class maxima of a part


class Derivatives(NamedTuple):
    """What comes down to a backward: pointers to contiguous numbers in float32, or None, and `out` an Array.

    Derivatives by statistics are 0 for the rows that do not count. See derivatives.py for what they are put into.
    """

    out: Any
    lse: Any  # (B, H, Q), that of every row
    level: Any  # (B, H, Q) what derivatives by probabilities are relative to
    bits: Any  # (B, H, Q) what makes scores probabilities: see Weights
    peak: Any  # (B, H, Q) with a floating mask
    entropy: Any  # (B, H, Q)
    collision: Any
    sink_mass: Any
    diagonal_mass: Any
    distance: Any
    offset_mass: Any  # (B, H, Q, O)
    offsets: Any  # (O,) int32
    least_offset: Any  # of the diagonal and the offsets
    largest_offset: Any
    tag_mass: Any  # (B, H, Q, T)
    feature_mass: Any  # (B, H, Q, F)
    received_mass: Any  # (B, H, K)
    chosen: Any  # (B, H, Q, C) derivatives by the scores of chosen keys,
    chosen_key: Any  # (B, H, Q, C) int32, -1 for none
    total_keys: Any  # K


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    BLOCK_M: Any
    BLOCK_N: Any
    D: Any
    E: Any
    PAD_D: Any  # D and E as powers of two of at least 16
    PAD_E: Any
    STEP_D: Any  # columns of a product of queries and keys at a time
    GROUP: Any  # query heads of one key head that share a tile (rows.py)
    PARTS: Any  # parts that the keys are split into
    LEFT: Any  # whether the window has that side
    RIGHT: Any
    MASK: Any  # 0 none, 1 bool, 2 floating
    SOFTCAP: Any
    OFFSETS: Any  # how many
    TAGS: Any
    FEATURES: Any
    TOPK: Any  # k, where a bound for it is wanted; else 0
    CLASSES: Any  # classes of keys whose maxima give that bound
    CHOSEN: Any  # chosen keys of each row, in a backward
    TRANSPOSED: Any  # tiles of scores are [N, M] and not [M, N]
    WIDE: Any  # strides so large that 32 bits do not hold a step within a tile
    DOT: Any  # precision of products: "ieee", or as the user lets torch round float32

    @classmethod
    def of(cls, **fields: Any) -> Plan:
        """A plan as kernels take it: its fields are compile-time constants."""
        return cls(**{name: constexpr(value) for name, value in fields.items()})


class Lists(NamedTuple):
    """Lists of tiles with candidates (topk.py), for each part of the keys and row."""

    counts: Any  # (parts, rows) int32
    starts: Any  # (parts, rows, CAPACITY) int32, first key of a tile
    words: Any  # (parts, rows, CAPACITY, BLOCK_N / 32) int32, a bit for each key of the tile


class Rows(NamedTuple):
    """The rows that a program serves (made inside of kernels)."""

    batch: Any
    head: Any  # query head, one for each row where heads share a tile
    key_head: Any
    first_row: Any  # of the tile, within its sequence
    row: Any  # [M] row within its sequence
    exists: Any  # [M]
    position: Any  # [M]
    first_position: Any  # of the rows that exist
    last_position: Any
    row0: Any  # first row and key of the sequence
    key0: Any
    keys: Any
    statistic: Any  # [M] index of the row in the statistics
    counted: Any  # [M] exists, and not left out by query_mask


def array(tensor: Tensor | None) -> Array | None:
    """`tensor` as kernels take it."""
    return None if tensor is None else Array(tensor, *(*tensor.stride(), 0, 0, 0, 0)[:4])


def rows_array(tensor: Tensor | None) -> Array | None:
    """`tensor` whose step from row to row is compiled in, where a row's numbers lie side by side.

    Places within a tile are then constants, where they would take registers. Such steps are few in a program; those of
    other layouts change with the length.
    """
    given = array(tensor)
    if given is None or given.s3 != 1:
        return given
    return given._replace(s2=constexpr(given.s2))
