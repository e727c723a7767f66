"""Which tiles a program of a backward walks over, in two loops: special ones first, then plain ones.

A tile is special where something is hidden in it, or where it holds keys of a sink, diagonal or offset whose mass has
a derivative. All others are plain: most calls have few special ones, and the loop over plain ones knows nothing of what
makes them so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attncap_kernels.received import rows_of_keys
from attncap_kernels.scores import seen_range


class Walk(NamedTuple):
    """`count` tiles from `begin` on, without `gap` of them after the first `before`, and `gap_2` after `before_2`."""

    begin: Any
    count: Any
    before: Any
    gap: Any
    before_2: Any
    gap_2: Any


@triton.jit
def tile_at(walk, place):
    """Number of the tile that comes at a place of the walk."""
    tile = walk.begin + place
    tile += tl.where(place < walk.before, 0, walk.gap)
    return tile + tl.where(place < walk.before_2, 0, walk.gap_2)


@triton.jit
def split(begin, plain_begin, band_begin, band_end, plain_end, end):
    """(special walk, plain walk): plain is what lies from plain_begin to plain_end, but for the band."""
    band_begin = tl.minimum(tl.maximum(band_begin, plain_begin), plain_end)
    band_end = tl.minimum(tl.maximum(band_end, band_begin), plain_end)
    before = plain_begin - begin
    before_2 = before + band_end - band_begin
    special = Walk(begin, before_2 + end - plain_end, before, band_begin - plain_begin, before_2, plain_end - band_end)
    count = band_begin - plain_begin
    plain = Walk(plain_begin, count + plain_end - band_end, count, band_end - band_begin, end, 0)
    return special, plain


@triton.jit
def walks_over_keys(given, numbers, rows, P: tl.constexpr):
    """(special, plain) walks over tiles of keys, of a program that owns rows."""
    begin, plain_begin, plain_end, end = seen_range(numbers, rows, P)
    begin, end = begin // P.BLOCK_N, tl.cdiv(end, P.BLOCK_N)
    plain_begin, plain_end = tl.cdiv(plain_begin, P.BLOCK_N), tl.cdiv(plain_end, P.BLOCK_N)
    if given.sink_mass is not None:
        plain_begin = tl.minimum(tl.maximum(plain_begin, tl.cdiv(numbers.sink, P.BLOCK_N)), plain_end)
    band_begin, band_end = plain_end, plain_end
    if given.diagonal_mass is not None or given.offset_mass is not None:
        band_begin = tl.maximum(rows.first_position + given.least_offset, 0) // P.BLOCK_N
        band_end = tl.maximum(rows.last_position + given.largest_offset, -1) // P.BLOCK_N + 1
    return split(begin, plain_begin, band_begin, band_end, plain_end, end)


@triton.jit
def walks_over_rows(given, numbers, start, rows, keys, offset, P: tl.constexpr):
    """(special, plain) walks over blocks of rows, of a program that owns keys start .. start + N - 1."""
    begin, plain_begin, plain_end, end = rows_of_keys(numbers, start, rows, keys, offset, P)
    if given.sink_mass is not None:
        plain_begin = tl.where(start < numbers.sink, plain_end, plain_begin)
    band_begin, band_end = plain_end, plain_end
    if given.diagonal_mass is not None or given.offset_mass is not None:
        band_begin = tl.maximum(start - given.largest_offset - offset, 0) // P.BLOCK_M
        last = start + P.BLOCK_N - 1 - given.least_offset - offset
        band_end = tl.maximum(last + P.BLOCK_M, 0) // P.BLOCK_M
    return split(begin, plain_begin, band_begin, band_end, plain_end, end)
