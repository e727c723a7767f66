"""Exact top-k in two passes, without a score stored.

The forward keeps, for each row, the largest x of C classes of keys (key j is of class j % C). Classes are disjoint, so
the k-th largest of these maxima bounds the row's k-th largest x from below. A second pass over the scores lists, for
each row, the tiles with keys that reach the bound and which keys those are, one bit for each; they are few. Their
scores are then computed again, one by one, and the k best are the top k.

Where a row's list is too short or too long, or there is no bound (fewer classes than k), the row's keys are all walked
with the k best so far at hand.
"""

import triton
import triton.language as tl

from attncap_kernels.candidates import LOWEST, NOT_A_PLACE, as_candidate, in_order, insert, no_candidates, score_and_key
from attncap_kernels.records import LENGTHS, Numbers
from attncap_kernels.rows import load_queries, locate
from attncap_kernels.scores import load_key_tile, pair_scores, score_of_x, seen_part, tile_scores
from attncap_kernels.softmax import relative_bits, unit_of


@triton.jit
def kth_largest(classes_MC, P: tl.constexpr):
    """[M] the k-th largest of each row's class maxima, equal ones taken as one: less is a bound too."""
    for _ in range(P.TOPK - 1):
        largest = tl.max(classes_MC, 1)
        classes_MC = tl.where(classes_MC == largest[:, None], float("-inf"), classes_MC)
    return tl.max(classes_MC, 1)


@triton.jit
def list_tile(
    count, bound, base, query_MD, inputs, numbers, lists, rows, start, MASKED: tl.constexpr, CAPACITY: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """List a tile for the rows some of whose keys reach the bound; their number of listed tiles."""
    key_DN = load_key_tile(inputs, rows, start, MASKED, P)
    x_MN = tile_scores(query_MD, key_DN, inputs, numbers, rows, start, MASKED, P)
    WORDS: tl.constexpr = P.BLOCK_N // 32
    bit = (tl.full([P.BLOCK_N], 1, tl.int32) << (tl.arange(0, P.BLOCK_N) % 32))[None, :]
    bits_MN = tl.where(x_MN >= bound[:, None], bit, 0)
    words_MW = tl.sum(tl.reshape(bits_MN, [P.BLOCK_M, WORDS, 32]), 2)
    listed = tl.max((words_MW != 0).to(tl.int32), 1)
    fits = (listed != 0) & (count < CAPACITY)
    place = base + count
    tl.store(lists.starts + place, start, mask=fits)
    tl.store(lists.words + (place * WORDS)[:, None] + tl.arange(0, WORDS)[None, :], words_MW, mask=fits[:, None])
    return count + listed


@triton.jit(do_not_specialize=[*LENGTHS, "first_program", "first_row", "list_rows"])
def list_candidates(
    inputs, bounds, lists, first_program, first_row, list_rows, sign, scale, softcap, rows, keys, offset, total_rows,
    left, right, CAPACITY: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Fill the lists of `list_rows` rows from first_row on (in the order of the statistics), one for each part."""
    numbers = Numbers(sign, scale, softcap, left, right, 0, 0)
    part = tl.program_id(1)
    here = locate(inputs, first_program + tl.program_id(0), 0, rows, keys, offset, total_rows, P)
    bound = tl.load(bounds + here.statistic, mask=here.exists, other=float("inf"))
    bound = tl.where(bound == float("-inf"), float("inf"), bound)  # rows that will be walked
    slot = part * list_rows.to(tl.int64) + here.statistic - first_row
    base = slot * CAPACITY
    query_MD = load_queries(inputs.query, numbers.sign, here, 0, P.D, P.PAD_D, P)
    begin, whole_begin, whole_end, end = seen_part(numbers, here, part, P)
    count = tl.zeros([P.BLOCK_M], tl.int32)
    if P.LEFT or P.MASK != 0:
        for start in tl.range(begin, whole_begin, P.BLOCK_N):
            count = list_tile(count, bound, base, query_MD, inputs, numbers, lists, here, start, True, CAPACITY, P)
    if P.MASK == 0:
        for start in tl.range(whole_begin, whole_end, P.BLOCK_N):
            count = list_tile(count, bound, base, query_MD, inputs, numbers, lists, here, start, False, CAPACITY, P)
        for start in tl.range(whole_end, end, P.BLOCK_N):
            count = list_tile(count, bound, base, query_MD, inputs, numbers, lists, here, start, True, CAPACITY, P)
    tl.store(lists.counts + slot, count, mask=here.exists)


@triton.jit
def score_listed(
    best, found, query_MD, inputs, numbers, lists, slot, rows, CAPACITY: tl.constexpr, WORDS: tl.constexpr,
    LIMIT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """(best, found) after one list of each row; it stops where a row has found LIMIT keys."""
    count = tl.load(lists.counts + slot, mask=rows.exists, other=0)
    word = tl.arange(0, WORDS)[None, :]
    for entry in range(tl.max(tl.minimum(count, CAPACITY), 0)):
        place = slot * CAPACITY + entry
        start = tl.load(lists.starts + place, mask=entry < count, other=0)
        words_MW = tl.load(lists.words + (place * WORDS)[:, None] + word, mask=(entry < count)[:, None], other=0)
        while (tl.max(tl.max((words_MW != 0).to(tl.int32), 1), 0) > 0) & (tl.max(found, 0) < LIMIT):
            # The lowest bit of each word as a power of two, whose float has its number as exponent.
            lowest = (words_MW & -words_MW).to(tl.uint32, bitcast=True).to(tl.float32)
            number = (lowest.to(tl.int32, bitcast=True) >> 23) - 127
            place_MW = tl.where(words_MW == 0, NOT_A_PLACE, 32 * word + number)
            first = tl.min(place_MW, 1)
            words_MW = tl.where(place_MW == first[:, None], words_MW & (words_MW - 1), words_MW)
            is_key = first < NOT_A_PLACE
            x = pair_scores(query_MD, inputs, numbers, rows, start + first, is_key, P)
            best = insert(best, as_candidate(x, start + first, is_key))
            found += is_key.to(tl.int32)
    return best, found


@triton.jit
def walk_all(query_MD, inputs, numbers, rows, KEPT: tl.constexpr, P: tl.constexpr):
    """[M, KEPT] the best candidates of each row, in any order, from all its keys."""
    best = no_candidates(KEPT, P)
    begin, _, _, end = seen_part(numbers, rows, 0, P)
    for start in tl.range(begin, end, P.BLOCK_N):
        key_DN = load_key_tile(inputs, rows, start, True, P)
        x_MN = tile_scores(query_MD, key_DN, inputs, numbers, rows, start, True, P)
        key = start + tl.arange(0, P.BLOCK_N)[None, :]
        tile = as_candidate(x_MN, key, x_MN > float("-inf"))
        largest = tl.max(tile, 1)
        while tl.max((largest > tl.min(best, 1)).to(tl.int32), 0) > 0:
            best = insert(best, largest)
            tile = tl.where(tile == largest[:, None], LOWEST, tile)
            largest = tl.max(tile, 1)
    return best


@triton.jit(do_not_specialize=[*LENGTHS, "first_program", "first_row", "list_rows"])
def select_candidates(
    inputs, bounds, lists, peaks, totals, topk_prob, topk_index, first_program, first_row, list_rows, sign, scale,
    softcap, rows, keys, offset, total_rows, left, right, LISTS: tl.constexpr, CAPACITY: tl.constexpr,
    WORDS: tl.constexpr, LIMIT: tl.constexpr, KEPT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The k best keys of each row, from LISTS lists, as probabilities and keys."""
    numbers = Numbers(sign, scale, softcap, left, right, 0, 0)
    here = locate(inputs, first_program + tl.program_id(0), 0, rows, keys, offset, total_rows, P)
    at, exists = here.statistic, here.exists
    peak = tl.load(peaks + at, mask=exists, other=float("-inf"))
    counts_row = peak > float("-inf")
    doubtful = tl.load(bounds + at, mask=exists, other=0.0) == float("-inf")
    for part in range(LISTS):
        count = tl.load(lists.counts + part * list_rows.to(tl.int64) + at - first_row, mask=exists, other=0)
        doubtful = doubtful | (count > CAPACITY)
    walk = tl.max((doubtful & counts_row).to(tl.int32), 0)

    query_MD = load_queries(inputs.query, numbers.sign, here, 0, P.D, P.PAD_D, P)
    best = no_candidates(KEPT, P)
    if walk == 0:
        found = tl.zeros([P.BLOCK_M], tl.int32)
        for part in range(LISTS):
            slot = part * list_rows.to(tl.int64) + at - first_row
            best, found = score_listed(
                best, found, query_MD, inputs, numbers, lists, slot, here, CAPACITY, WORDS, LIMIT, P
            )
        walk = tl.max((counts_row & ((found < P.TOPK) | (found >= LIMIT))).to(tl.int32), 0)
    if walk > 0:
        best = walk_all(query_MD, inputs, numbers, here, KEPT, P)

    x, key, found = score_and_key(in_order(best, KEPT, P))
    found = found & counts_row[:, None]
    total = tl.load(totals + at, mask=exists, other=1.0)
    bits = relative_bits(x, peak, unit_of(score_of_x(numbers, P)), True, P)
    # A score of another order of summation may pass the row's largest by a rounding.
    prob = tl.where(found, tl.minimum(tl.exp2(bits) / total[:, None], 1.0), 0.0)
    column = tl.arange(0, KEPT)[None, :]
    inside = exists[:, None] & (column < P.TOPK)
    tl.store(topk_prob + (at * P.TOPK)[:, None] + column, prob, mask=inside)
    tl.store(topk_index + (at * P.TOPK)[:, None] + column, tl.where(found, key, -1), mask=inside)
