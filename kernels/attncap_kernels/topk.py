"""Exact top-k in two passes, without a score stored.

The forward keeps, for each row, the largest x of C classes of keys (key j is of class j % C). Classes are disjoint, so
the k-th largest of these maxima bounds the row's k-th largest x from below: `bound`. A second pass over the scores
appends the few keys that reach it to a list of the row, and the k best of the list are the top k. Where a list
overflows (many equal scores) or is too short, the row's keys are all walked again with the k best so far at hand.

A candidate is one 64-bit number that orders as the statistic does: the score's bits above, the key's complement below,
so that a larger score comes first and, among equal scores, the lower index.
"""

import triton
import triton.language as tl

from attncap_kernels.records import Numbers
from attncap_kernels.rows import load_queries, locate
from attncap_kernels.scores import load_key_tile, part_of_keys, score_of_x, seen_range, tile_scores
from attncap_kernels.softmax import LOG2_E, finite

NO_CANDIDATE = tl.constexpr(-(2**63))  # this and the numbers just above it are places that no key has taken
LEAST_CANDIDATE = tl.constexpr(-(2**63) + 2**32)
LAST_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def kth_largest(classes_MC, P: tl.constexpr):
    """[M] the k-th largest of each row's class maxima, equal ones taken as one: less is a bound too."""
    for _ in range(P.TOPK - 1):
        largest = tl.max(classes_MC, 1)
        classes_MC = tl.where(classes_MC == largest[:, None], float("-inf"), classes_MC)
    return tl.max(classes_MC, 1)


@triton.jit
def candidate(x_MN, key_N):
    """Scores and keys as 64-bit numbers."""
    bits = (x_MN + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (key_N ^ LAST_KEY).to(tl.int64)[None, :]


@triton.jit
def score_and_key(packed):
    """(x, key) of candidates."""
    ordered = (packed >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True), (packed & 0xFFFFFFFF).to(tl.int32) ^ LAST_KEY


@triton.jit
def append_tile(bound, slot, query_MD, inputs, numbers, counts, lists, rows, start, MASKED: tl.constexpr, CAPACITY: tl.constexpr, P: tl.constexpr):
    """Append to each row's list the keys of a tile that reach its bound."""
    key_DN = load_key_tile(inputs, rows, start, MASKED, P)
    x_MN = tile_scores(query_MD, key_DN, inputs, numbers, rows, start, MASKED, P)
    reaches = x_MN >= bound[:, None]
    if MASKED:
        reaches = reaches & (x_MN > float("-inf"))
    key = start + tl.arange(0, P.BLOCK_N)
    place = tl.atomic_add((counts + slot)[:, None] + key[None, :] * 0, 1, mask=reaches, sem="relaxed")
    pointer = (lists + slot * CAPACITY)[:, None] + place
    tl.store(pointer, candidate(x_MN, key), mask=reaches & (place < CAPACITY))


@triton.jit(do_not_specialize=["first_program", "first_row", "rows", "keys", "offset", "total_rows", "left", "right"])
def append_candidates(
    inputs, bounds, counts, lists, first_program, first_row, sign, scale, softcap, rows, keys, offset, total_rows,
    left, right, CAPACITY: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Fill the lists of rows first_row .. (in the order of the statistics); `counts` starts at 0."""
    numbers = Numbers(sign, scale, softcap, left, right, 0, 0)
    here = locate(inputs, first_program + tl.program_id(0), 0, rows, keys, offset, total_rows, P)
    bound = tl.load(bounds + here.statistic, mask=here.exists, other=float("inf"))
    slot = here.statistic - first_row
    query_MD = load_queries(inputs, numbers, here, P)
    begin, whole_begin, whole_end, end = seen_range(numbers, here, P)
    if P.PARTS > 1:
        part_begin, part_end = part_of_keys(tl.program_id(1), here.keys, P)
        begin, end = tl.maximum(begin, part_begin), tl.minimum(end, part_end)
        whole_begin = tl.minimum(tl.maximum(whole_begin, begin), end)
        whole_end = tl.minimum(tl.maximum(whole_end, whole_begin), end)
    if P.LEFT or P.MASK != 0:
        for start in tl.range(begin, whole_begin, P.BLOCK_N):
            append_tile(bound, slot, query_MD, inputs, numbers, counts, lists, here, start, True, CAPACITY, P)
    if P.MASK == 0:
        for start in tl.range(whole_begin, whole_end, P.BLOCK_N):
            append_tile(bound, slot, query_MD, inputs, numbers, counts, lists, here, start, False, CAPACITY, P)
        for start in tl.range(whole_end, end, P.BLOCK_N):
            append_tile(bound, slot, query_MD, inputs, numbers, counts, lists, here, start, True, CAPACITY, P)


@triton.jit
def in_order(packed_ML, KEPT: tl.constexpr, P: tl.constexpr):
    """[M, KEPT] the k best of each row, best first."""
    column = tl.arange(0, KEPT)[None, :]
    best = tl.full([P.BLOCK_M, KEPT], NO_CANDIDATE, tl.int64)
    for place in range(P.TOPK):
        largest = tl.max(packed_ML, 1)[:, None]
        best = tl.where(column == place, largest, best)
        packed_ML = tl.where(packed_ML == largest, NO_CANDIDATE, packed_ML)
    return best


@triton.jit
def walk_all(query_MD, inputs, numbers, rows, KEPT: tl.constexpr, P: tl.constexpr):
    """[M, KEPT] the best candidates of each row in any order, from all its keys.

    The places start with different numbers, so that a new candidate takes the place of one of them only.
    """
    places = NO_CANDIDATE + tl.arange(0, KEPT).to(tl.int64)
    best = tl.zeros([P.BLOCK_M, KEPT], tl.int64) + tl.where(tl.arange(0, KEPT) < P.TOPK, places, 2**63 - 1)[None, :]
    begin, _, _, end = seen_range(numbers, rows, P)
    for start in tl.range(begin, end, P.BLOCK_N):
        key_DN = load_key_tile(inputs, rows, start, True, P)
        x_MN = tile_scores(query_MD, key_DN, inputs, numbers, rows, start, True, P)
        tile = tl.where(x_MN > float("-inf"), candidate(x_MN, start + tl.arange(0, P.BLOCK_N)), NO_CANDIDATE)
        largest, least = tl.max(tile, 1), tl.min(best, 1)
        while tl.max((largest > least).to(tl.int32), 0) > 0:
            better = (largest > least)[:, None]
            best = tl.where(better & (best == least[:, None]), largest[:, None], best)
            tile = tl.where(better & (tile == largest[:, None]), NO_CANDIDATE, tile)
            largest, least = tl.max(tile, 1), tl.min(best, 1)
    return tl.where(best == 2**63 - 1, NO_CANDIDATE, best)


@triton.jit(do_not_specialize=["first_program", "first_row", "rows", "keys", "offset", "total_rows", "left", "right"])
def select_candidates(
    inputs, bounds, counts, lists, peaks, totals, topk_prob, topk_index, first_program, first_row, sign, scale, softcap,
    rows, keys, offset, total_rows, left, right, CAPACITY: tl.constexpr, KEPT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The k best of each row's list, as probabilities and keys."""
    numbers = Numbers(sign, scale, softcap, left, right, 0, 0)
    here = locate(inputs, first_program + tl.program_id(0), 0, rows, keys, offset, total_rows, P)
    at, exists = here.statistic, here.exists
    slot = at - first_row
    count = tl.load(counts + slot, mask=exists, other=0)
    bound = tl.load(bounds + at, mask=exists, other=float("inf"))
    peak = tl.load(peaks + at, mask=exists, other=float("-inf"))
    # A bound of -inf lets every key in, so that a short list is whole. Rows that do not count have a peak of -inf.
    doubtful = (count > CAPACITY) | ((count < P.TOPK) & (bound > float("-inf")))
    if tl.max((doubtful & (peak > float("-inf"))).to(tl.int32), 0) > 0:
        query_MD = load_queries(inputs, numbers, here, P)
        best = in_order(walk_all(query_MD, inputs, numbers, here, KEPT, P), KEPT, P)
    else:
        place = tl.arange(0, CAPACITY)[None, :]
        pointer = (lists + slot * CAPACITY)[:, None] + place
        listed = tl.load(pointer, mask=place < count[:, None], other=NO_CANDIDATE)
        best = in_order(listed, KEPT, P)

    x, key = score_and_key(best)
    found = (best >= LEAST_CANDIDATE) & (peak > float("-inf"))[:, None]
    total = tl.load(totals + at, mask=exists, other=1.0)
    if P.MASK == 2:
        bits = (x - finite(peak)[:, None]) * LOG2_E
    else:
        unit = score_of_x(numbers, P) * LOG2_E
        bits = x * unit - (finite(peak) * unit)[:, None]
    prob = tl.where(found, tl.exp2(bits) / total[:, None], 0.0)
    column = tl.arange(0, KEPT)[None, :]
    inside = exists[:, None] & (column < P.TOPK)
    tl.store(topk_prob + (at * P.TOPK)[:, None] + column, prob, mask=inside)
    tl.store(topk_index + (at * P.TOPK)[:, None] + column, tl.where(found, key, -1), mask=inside)
