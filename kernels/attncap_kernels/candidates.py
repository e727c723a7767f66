"""Keys with their scores as 64-bit numbers that order as the top k does.

The score's bits stand above, made to order as integers, and the key's complement below: a larger score comes first
and, among equal scores, the lower key. Places that no key has taken hold the lowest numbers, each another one, so that
a new candidate takes the place of exactly one.
"""

import triton
import triton.language as tl

NOT_A_PLACE = tl.constexpr(2**20)
LOWEST = tl.constexpr(-(2**63))
LEAST_CANDIDATE = tl.constexpr(-(2**63) + 2**32)
LARGEST = tl.constexpr(2**63 - 1)
LAST_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def as_candidate(x, key, exists):
    """Candidates of scores x and keys, LOWEST where they do not exist."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    ordered = tl.where(bits < 0, bits ^ LAST_KEY, bits)
    return tl.where(exists, (ordered.to(tl.int64) << 32) | (key ^ LAST_KEY).to(tl.int64), LOWEST)


@triton.jit
def score_and_key(packed):
    """(x, key, whether there is one) of candidates."""
    ordered = (packed >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ LAST_KEY, ordered)
    key = (packed & 0xFFFFFFFF).to(tl.int32) ^ LAST_KEY
    exists = packed >= LEAST_CANDIDATE
    return tl.where(exists, bits.to(tl.float32, bitcast=True), 0.0), key, exists


@triton.jit
def no_candidates(KEPT: tl.constexpr, P: tl.constexpr):
    """[M, KEPT] of which the first k places are free, and the others never taken."""
    place = tl.arange(0, KEPT)
    free = tl.where(place < P.TOPK, LOWEST + 1 + place.to(tl.int64), LARGEST)
    return tl.zeros([P.BLOCK_M, KEPT], tl.int64) + free[None, :]


@triton.jit
def insert(best_MK, candidate_M):
    """Each row's candidate in the place of its least, if it is better."""
    least = tl.min(best_MK, 1)
    takes = (candidate_M > least)[:, None] & (best_MK == least[:, None])
    return tl.where(takes, candidate_M[:, None], best_MK)


@triton.jit
def in_order(best_MK, KEPT: tl.constexpr, P: tl.constexpr):
    """[M, KEPT] the k best of each row, best first."""
    best_MK = tl.where(best_MK == LARGEST, LOWEST, best_MK)
    column = tl.arange(0, KEPT)[None, :]
    ordered = tl.full([P.BLOCK_M, KEPT], LOWEST, tl.int64)
    for place in range(P.TOPK):
        largest = tl.max(best_MK, 1)[:, None]
        ordered = tl.where(column == place, largest, ordered)
        best_MK = tl.where(best_MK == largest, LOWEST, best_MK)
    return ordered
