"""dk and dv: a program owns keys of a key head and walks over the rows of all its query heads, in their order.

    dk_j = scale sum_i dproduct_ij q_i        dv_j = sum_i p_ij dout_i

Tiles are [N, M], so that probabilities are a factor of products as they come out of one.
"""

import triton
import triton.language as tl

from attncap_kernels.derivatives import load_weights, signed, tile_derivatives
from attncap_kernels.records import LENGTHS
from attncap_kernels.rows import block_of_rows, load_keys, load_rows, locate_keys, store_block
from attncap_kernels.walks import tile_at, walks_over_rows


@triton.jit
def from_blocks(
    dkey_ND, dvalue_NE, key_ND, value_NE, inputs, given, numbers, key_gradient, value_gradient, batch, key_head,
    walk, sequence, total_rows, start, SPECIAL: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The sums after the blocks of a walk over the rows of each query head."""
    group = inputs.heads // inputs.key_heads
    head, place = key_head * group, 0
    for _ in tl.range(0, group * walk.count):
        block = tile_at(walk, place)
        rows = block_of_rows(inputs, batch, head, block, 0, sequence, total_rows, P)
        query_MD = load_rows(inputs.query, rows, 0, P.D, P.PAD_D, SPECIAL, P)
        derivative_ME = query_MD
        if given.out is not None:
            derivative_ME = load_rows(given.out, rows, 0, P.E, P.PAD_E, SPECIAL, P)
        weights = load_weights(given, rows, SPECIAL, P)
        p_NM, _, dproduct_NM = tile_derivatives(
            query_MD, key_ND, derivative_ME, value_NE, weights, inputs, given, numbers, rows, start, SPECIAL, P
        )
        if value_gradient is not None:
            dvalue_NE = tl.dot(p_NM.to(derivative_ME.dtype), derivative_ME, dvalue_NE, input_precision=P.DOT)
        if key_gradient is not None:
            dkey_ND = tl.dot(dproduct_NM.to(query_MD.dtype), query_MD, dkey_ND, input_precision=P.DOT)
        # One loop over heads and blocks, so that loads of the next head do not wait for this one's end.
        is_last = place == walk.count - 1
        head = tl.where(is_last, head + 1, head)
        place = tl.where(is_last, 0, place + 1)
    return dkey_ND, dvalue_NE


@triton.jit(do_not_specialize=[*LENGTHS, "sink", "diagonal"])
def backward_keys(
    inputs, given, key_gradient, value_gradient, sign, scale, softcap, rows, keys, offset, total_rows, left, right,
    sink, diagonal, P: tl.constexpr,
):  # fmt: skip
    """One program for each tile of keys, key head and batch entry."""
    numbers = signed(sign, scale, softcap, left, right, sink, diagonal)
    batch, key_head, start, sequence = locate_keys(inputs, tl.program_id(0), inputs.key_heads, rows, keys, offset, P)
    _, rows, key0, keys, offset = sequence
    first_head = key_head * (inputs.heads // inputs.key_heads)
    first = block_of_rows(inputs, batch, first_head, 0, 0, sequence, total_rows, P)
    key_ND = load_keys(inputs.key, first, start, 0, P.BLOCK_N, P.D, P.PAD_D, False, True, P.WIDE)
    value_NE = load_keys(inputs.value, first, start, 0, P.BLOCK_N, P.E, P.PAD_E, False, True, P.WIDE)
    dkey_ND = tl.zeros([P.BLOCK_N, P.PAD_D], tl.float32)
    dvalue_NE = tl.zeros([P.BLOCK_N, P.PAD_E], tl.float32)
    special, plain = walks_over_rows(given, numbers, start, rows, keys, offset, P)
    dkey_ND, dvalue_NE = from_blocks(
        dkey_ND, dvalue_NE, key_ND, value_NE, inputs, given, numbers, key_gradient, value_gradient, batch, key_head,
        special, sequence, total_rows, start, True, P,
    )  # fmt: skip
    if P.MASK == 0:
        dkey_ND, dvalue_NE = from_blocks(
            dkey_ND, dvalue_NE, key_ND, value_NE, inputs, given, numbers, key_gradient, value_gradient, batch,
            key_head, plain, sequence, total_rows, start, False, P,
        )  # fmt: skip
    exists = start + tl.arange(0, P.BLOCK_N) < keys
    place = (key0 + start).to(tl.int64)
    if key_gradient is not None:
        base = key_gradient.ptr + batch * key_gradient.s0 + key_head.to(tl.int64) * key_gradient.s1
        scaled_ND = dkey_ND * numbers.scale
        store_block(key_gradient, base + place * key_gradient.s2, exists, scaled_ND, P.D, P.PAD_D, P.BLOCK_N)
    if value_gradient is not None:
        base = value_gradient.ptr + batch * value_gradient.s0 + key_head.to(tl.int64) * value_gradient.s1
        store_block(value_gradient, base + place * value_gradient.s2, exists, dvalue_NE, P.E, P.PAD_E, P.BLOCK_N)
