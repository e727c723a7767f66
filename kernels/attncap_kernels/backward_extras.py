"""Gradients of a floating mask and of features of keys: each number is summed by one program, in one order.

The mask's are dbias_ij = dscore_ij, summed over what it is broadcast over; df_jf = sum_i,h p_ij dfeature_mass_if.
"""

import triton
import triton.language as tl

from attncap_kernels.derivatives import load_weights, signed, tile_bits, tile_derivatives
from attncap_kernels.received import rows_of_keys
from attncap_kernels.records import LENGTHS
from attncap_kernels.rows import block_of_rows, load_keys, load_rows, locate_keys
from attncap_kernels.scores import load_key_tile, seen_range

FEATURES_AT_ONCE = tl.constexpr(4)


@triton.jit
def mask_from_rows(
    total_MN, inputs, given, numbers, batch, head, block, sequence, total_rows, own, OVER_KEYS: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """The sum after one block of rows and the tile of keys from `own` on, or all tiles if OVER_KEYS."""
    rows = block_of_rows(inputs, batch, head, block, 0, sequence, total_rows, P)
    query_MD = load_rows(inputs.query, rows, 0, P.D, P.PAD_D, True, P)
    derivative_ME = query_MD
    if given.out is not None:
        derivative_ME = load_rows(given.out, rows, 0, P.E, P.PAD_E, True, P)
    weights = load_weights(given, rows, True, P)
    begin, _, _, end = seen_range(numbers, rows, P)
    if not OVER_KEYS:
        begin, end = tl.maximum(begin, own), tl.minimum(end, own + P.BLOCK_N)
    for start in tl.range(begin, end, P.BLOCK_N):
        key_DN = load_key_tile(inputs, rows, start, True, P)
        value_EN = load_keys(inputs.value, rows, start, 0, P.BLOCK_N, P.E, P.PAD_E, True, True, P.WIDE)
        _p, dscore_MN, _dproduct = tile_derivatives(
            query_MD, key_DN, derivative_ME, value_EN, weights, inputs, given, numbers, rows, start, True, P
        )
        total_MN += dscore_MN
    return total_MN


@triton.jit
def own_of_mask(
    inputs, rows, keys, batches, OVER_BATCHES: tl.constexpr, OVER_HEADS: tl.constexpr, OVER_ROWS: tl.constexpr,
    OVER_KEYS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """(tile of keys, block of rows, head, batch) that a program begins with, and how many it walks over of the last."""
    blocks, tiles = tl.cdiv(rows, P.BLOCK_M), tl.cdiv(keys, P.BLOCK_N)
    rest = tl.program_id(0)
    tile, block, head = rest * 0, rest * 0, rest * 0
    block_count, head_count, batch_count = blocks, inputs.heads, batches
    if not OVER_KEYS:
        tile = rest % tiles
        rest //= tiles
    if not OVER_ROWS:
        block, block_count = rest % blocks, 1
        rest //= blocks
    if not OVER_HEADS:
        head, head_count = rest % inputs.heads, 1
        rest //= inputs.heads
    if not OVER_BATCHES:
        batch_count = 1
    return tile, block, head, rest.to(tl.int64), block_count, head_count, batch_count


@triton.jit(do_not_specialize=[*LENGTHS, "sink", "diagonal"])
def backward_mask(
    inputs, given, gradient, sign, scale, softcap, rows, keys, offset, total_rows, left, right, sink, diagonal,
    batches, OVER_BATCHES: tl.constexpr, OVER_HEADS: tl.constexpr, OVER_ROWS: tl.constexpr, OVER_KEYS: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """One program for each tile of the mask itself, whose sizes are 1 where it is broadcast."""
    numbers = signed(sign, scale, softcap, left, right, sink, diagonal)
    tile, block, head, batch, block_count, head_count, batch_count = own_of_mask(
        inputs, rows, keys, batches, OVER_BATCHES, OVER_HEADS, OVER_ROWS, OVER_KEYS, P
    )
    sequence = (tile * 0, rows, tile * 0, keys, offset)
    total_MN = tl.zeros([P.BLOCK_M, P.BLOCK_N], tl.float32)
    for batch_step in range(batch_count):
        for head_step in range(head_count):
            for block_step in range(block_count):
                total_MN = mask_from_rows(
                    total_MN, inputs, given, numbers, batch + batch_step, head + head_step, block + block_step,
                    sequence, total_rows, tile * P.BLOCK_N, OVER_KEYS, P,
                )  # fmt: skip
    if OVER_KEYS:
        total_MN = tl.sum(total_MN, 1, keep_dims=True)
    if OVER_ROWS:
        total_MN = tl.sum(total_MN, 0, keep_dims=True)
    row = block * P.BLOCK_M + tl.arange(0, total_MN.shape[0])[:, None]
    key = tile * P.BLOCK_N + tl.arange(0, total_MN.shape[1])[None, :]
    place = batch * gradient.s0 + head.to(tl.int64) * gradient.s1
    pointer = gradient.ptr + place + row.to(tl.int64) * gradient.s2 + key.to(tl.int64) * gradient.s3
    tl.store(pointer, total_MN.to(gradient.ptr.dtype.element_ty), mask=(row < rows) & (key < keys))


@triton.jit
def features_from_rows(totals, key_DN, inputs, given, numbers, batch, head, block, chunk, sequence, total_rows, start,
                       P: tl.constexpr):  # fmt: skip
    """The sums of FEATURES_AT_ONCE features after one block of rows."""
    rows = block_of_rows(inputs, batch, head, block, 0, sequence, total_rows, P)
    query_MD = load_rows(inputs.query, rows, 0, P.D, P.PAD_D, True, P)
    weights = load_weights(given, rows, True, P)
    _, t_MN = tile_bits(query_MD, key_DN, weights, inputs, numbers, rows, start, True, P)
    p_MN = tl.exp2(t_MN)
    sums = ()
    for index in tl.static_range(FEATURES_AT_ONCE):
        feature = chunk * FEATURES_AT_ONCE + index
        at = given.feature_mass + rows.statistic * P.FEATURES + feature
        weight = tl.load(at, mask=rows.exists & (feature < P.FEATURES), other=0.0)
        sums = sums + (totals[index] + tl.sum(p_MN * weight[:, None], 0),)
    return sums


@triton.jit(do_not_specialize=LENGTHS)
def backward_features(
    inputs, given, gradient, sign, scale, softcap, rows, keys, offset, total_rows, left, right, P: tl.constexpr
):
    """One program for each tile of keys, batch entry and FEATURES_AT_ONCE features."""
    numbers = signed(sign, scale, softcap, left, right, 0, 0)
    batch, _, start, sequence = locate_keys(inputs, tl.program_id(0), 1, rows, keys, offset, P)
    chunk = tl.program_id(1)
    _, rows, key0, keys, offset = sequence
    begin, _, _, end = rows_of_keys(numbers, start, rows, keys, offset, P)
    totals = (tl.zeros([P.BLOCK_N], tl.float32),) * FEATURES_AT_ONCE
    for step in range(inputs.heads):
        head = start * 0 + step
        first = block_of_rows(inputs, batch, head, 0, 0, sequence, total_rows, P)
        key_DN = load_key_tile(inputs, first, start, True, P)
        for block in tl.range(begin, end):
            totals = features_from_rows(
                totals, key_DN, inputs, given, numbers, batch, head, block, chunk, sequence, total_rows, start, P
            )
    key = start + tl.arange(0, P.BLOCK_N)
    place = batch * gradient.s0 + (key0 + key).to(tl.int64) * gradient.s1
    for index in tl.static_range(FEATURES_AT_ONCE):
        feature = chunk * FEATURES_AT_ONCE + index
        pointer = gradient.ptr + place + feature * gradient.s2
        tl.store(pointer, totals[index].to(gradient.ptr.dtype.element_ty), mask=(key < keys) & (feature < P.FEATURES))
