"""Before a backward: the level that each row's derivatives by probabilities are taken relative to.

    level_i = dout_i . out_i + sum_j p_ij dreceived_mass_j + what the other statistics add, which is given

The sum over keys takes a walk, and so do the key with the largest score, where no statistic has named it, and the peak
of rows with a floating mask: a mask of the smallest float leaves the lse no digits.
"""

import triton
import triton.language as tl

from attncap_kernels.derivatives import load_received
from attncap_kernels.finish import null_x
from attncap_kernels.records import LENGTHS, Numbers
from attncap_kernels.rows import load_queries, load_rows, locate
from attncap_kernels.scores import load_key_tile, score_of_x, seen_range, tile_scores
from attncap_kernels.softmax import LOG2_E, join_null_outcome, relative_bits, rescale, sees_keys, unit_of

NO_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def walk_tile(
    m, l, received, best, query_MD, inputs, given, largest_key, numbers, rows, start, MASKED: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """(m, l, sum of 2^t dreceived, first key of the largest x) after keys start .. start + N - 1."""
    unit = unit_of(score_of_x(numbers, P))
    key_DN = load_key_tile(inputs, rows, start, MASKED, P)
    x_MN = tile_scores(query_MD, key_DN, inputs, numbers, rows, start, MASKED, P)
    largest = tl.max(x_MN, 1)
    new_m = tl.maximum(m, largest)
    _, factor = rescale(m, new_m, unit)
    p_MN = tl.exp2(relative_bits(x_MN, new_m, unit, MASKED, P))
    key = start + tl.arange(0, P.BLOCK_N)
    if largest_key is not None:
        first = tl.min(tl.where(x_MN == largest[:, None], key[None, :], NO_KEY), 1)
        best = tl.where(largest > m, first, best)
    if given.received_mass is not None:
        weight_N = load_received(given, inputs, rows, key, key < rows.keys)
        received = received * factor + tl.sum(p_MN * weight_N[None, :], 1)
    return new_m, l * factor + tl.sum(p_MN, 1), received, best


@triton.jit
def walk(inputs, given, largest_key, numbers, rows, P: tl.constexpr):
    """(m, l, sum of 2^t dreceived, first key of the largest x) over all keys."""
    query_MD = load_queries(inputs.query, numbers.sign, rows, 0, P.D, P.PAD_D, P)
    begin, whole_begin, whole_end, end = seen_range(numbers, rows, P)
    m = tl.full([P.BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([P.BLOCK_M], tl.float32)
    received = tl.zeros([P.BLOCK_M], tl.float32)
    best = tl.full([P.BLOCK_M], -1, tl.int32)
    if P.LEFT or P.MASK != 0:
        for start in tl.range(begin, whole_begin, P.BLOCK_N):
            m, l, received, best = walk_tile(
                m, l, received, best, query_MD, inputs, given, largest_key, numbers, rows, start, True, P
            )
    if P.MASK == 0:
        for start in tl.range(whole_begin, whole_end, P.BLOCK_N):
            m, l, received, best = walk_tile(
                m, l, received, best, query_MD, inputs, given, largest_key, numbers, rows, start, False, P
            )
        for start in tl.range(whole_end, end, P.BLOCK_N):
            m, l, received, best = walk_tile(
                m, l, received, best, query_MD, inputs, given, largest_key, numbers, rows, start, True, P
            )
    return m, l, received, best


@triton.jit(do_not_specialize=LENGTHS)
def backward_levels(
    inputs, given, out, first_level, largest_key, sign, scale, softcap, rows, keys, offset, total_rows, left, right,
    WALK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One program for each tile of rows: level, peak and bits of `given` are written, and `largest_key`."""
    numbers = Numbers(sign, scale, softcap, left, right, 0, 0)
    here = locate(inputs, tl.program_id(0), 0, rows, keys, offset, total_rows, P)
    at, exists = here.statistic, here.exists
    lse = tl.load(given.lse + at, mask=exists, other=float("-inf"))
    sees = lse != float("-inf")
    bits = tl.where(sees, lse, 0.0) * LOG2_E
    level = tl.zeros([P.BLOCK_M], tl.float32)
    if given.out is not None:
        out_ME = load_rows(out, here, 0, P.E, P.PAD_E, True, P).to(tl.float32)
        derivative_ME = load_rows(given.out, here, 0, P.E, P.PAD_E, True, P).to(tl.float32)
        level += tl.where(sees, tl.sum(out_ME * derivative_ME, 1), 0.0)
    if first_level is not None:
        level += tl.load(first_level + at, mask=exists, other=0.0)
    if WALK:
        m, l, received, best = walk(inputs, given, largest_key, numbers, here, P)
        sees_any = sees_keys(l)
        factor = tl.full([P.BLOCK_M], 1.0, tl.float32)
        if inputs.sink_logits is not None:
            unit = unit_of(score_of_x(numbers, P))
            m, l, _, factor, _ = join_null_outcome(m, l, l, null_x(inputs, numbers, here, P), unit)
        l = tl.where(sees_any, l, 1.0)
        if given.peak is not None:
            tl.store(given.peak + at, tl.where(sees_any, m, 0.0), mask=exists)
            bits = tl.log2(l)
        if given.received_mass is not None:
            level += tl.where(here.counted & sees_any, received * factor / l, 0.0)
        if largest_key is not None:
            tl.store(largest_key + at, best, mask=exists)
    tl.store(given.level + at, level, mask=exists)
    tl.store(given.bits + at, bits, mask=exists)
